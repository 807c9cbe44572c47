"""The documents against the program: the tree, the commands and the links of the README are the real ones.

Also that no tracked text file names a folder of one machine or a package host.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "server", "client", "kiosk")
DOCUMENTS = sorted(ROOT.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
COMMANDS = ("afya-model", "afya-server", "afya-client", "afya-kiosk")
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".sh", ".html", ".css", ".jinja", ""}


def tracked() -> list[Path]:
    """Files that git tracks, or would: what a clone gets."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


def tree_in_readme() -> dict[str, str]:
    """Path -> description of every line of the README's file tree."""
    block = re.search(r"```tree\n(.*?)```", README, re.S)
    assert block, "README.md has no ```tree block"
    found, folder = {}, ""
    for line in block[1].splitlines():
        entry, _, about = line.strip().partition("  ")
        if not entry:
            continue
        if not line.startswith(" "):
            folder = entry if entry.endswith("/") else ""
            found[entry] = about.strip()
        else:
            found[folder + entry] = about.strip()
    return found


def test_the_tree_in_the_readme_is_the_real_one() -> None:
    listed = tree_in_readme()
    missing = [path for path in listed if not (ROOT / path).exists()]
    real = {path.relative_to(ROOT).as_posix() for path in tracked()}
    modules = {p for p in real if p.split("/")[0] in {*PACKAGES, "scripts"} and p.count("/") == 1}
    modules = {p for p in modules if not p.endswith("__init__.py")}
    assert not missing, "in the README's tree, not on disk"
    assert not sorted(modules - set(listed)), "on disk, not in the README's tree"
    assert not [path for path, about in listed.items() if not about], "without a word on what it is"


def commands_in_documents() -> set[tuple[str, ...]]:
    """(program, subcommand or "", options used) of every afya command in a code block or between back quotes.

    The subcommand of a group is two words, as in "data build".
    """
    found = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for block, inline in re.findall(r"```(?:sh|bash)\n(.*?)```|`([^`\n]+)`", text, re.S):
            for line in (block or inline).splitlines():
                if match := re.match(
                    r"\s*(?:\.venv/bin/)?(afya-(?:model|server|client|kiosk))\b(?: ((?:data )?[a-z][a-z-]+))?(.*)", line
                ):
                    found.add((match[1], match[2] or "", *re.findall(r"--[a-z][a-z-]*", match[3].split("#")[0])))
    return found


def test_every_command_of_the_documents_exists_with_its_options() -> None:
    wrong = []
    for program, name, *options in sorted(commands_in_documents()):
        done = run_help(program, *name.split())
        unknown = [option for option in options if option not in done.stdout]
        if done.returncode or unknown:
            wrong.append(" ".join([program, name, *unknown]))
    assert not wrong, "named in a document, not there"


def run_help(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / command, *arguments, "--help"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command: str) -> None:
    seconds = []
    for _ in range(3):  # processor time, so that a busy machine does not fail the test
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_help(command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "Usage:" in done.stdout
    assert min(seconds) <= 0.3


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").iterdir() if p.is_file() and not p.suffix))
def test_every_script_explains_itself(script: str) -> None:
    done = subprocess.run([ROOT / "scripts" / script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        if (path and not (document.parent / path).exists()) or (not path and anchor not in anchors):
            wrong.append(link)
    assert not wrong


def test_no_file_names_one_machine_or_a_package_host() -> None:
    hosts = "|".join(
        ["py" + r"pi\.org", "python" + "hosted", "npm" + r"js\.", r"deb\." + "debian", "files.py" + "thon"]
    )
    pattern = re.compile(rf"{hosts}|(?<![\w.\-/$}}])/(?:work|farm|root|home/\w+)/\w")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix in TEXT and path.name != "LICENSE" and path.stat().st_size < 2_000_000
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong


def test_every_installed_package_is_pinned_by_name_and_version_only() -> None:
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.!]+", line)]
    pinned = {line.split("==")[0] for line in lines}
    needed = re.findall(r'^\s*"?([A-Za-z][\w-]*)(?:>=|==)', (ROOT / "pyproject.toml").read_text(), re.M)
    assert not sorted({n.lower().replace("_", "-") for n in needed} - pinned)
