"""Training stands still while the kiosk answers, within a second, and goes on after; a dead kiosk holds nothing up.

The kiosk's side and the clinic's are two processes that share a folder, as they are in a clinic.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import trainer
from client.courtesy import LOOK, Courtesy, TimeOver, between_layers
from client.steps import Gradient
from kiosk.busy import Inbox
from model import adapters, phantoms
from tests.conftest import REPOSITORY


class Steps:
    """The times of a training process's steps, as they come."""

    def __init__(self, home: Path, base: Path) -> None:
        line = [sys.executable, "-m", "tests.client.slow_trainer", str(home), str(base)]
        self.child = subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        self.times: list[float] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line[0].isdigit():
                self.times.append(float(line))

    def after(self, moment: float, seconds: float = 60.0) -> float:
        """Time of the first step after `moment`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if later := [t for t in self.times if t > moment]:
                return later[0]
            assert self.child.poll() is None, "training has ended"
            time.sleep(0.02)
        raise AssertionError("no step came")

    def between(self, first: float, last: float) -> int:
        return sum(first < t < last for t in self.times)


@pytest.fixture
def steps(afya_home: Path, tiny: Path) -> Iterator[Steps]:
    running = Steps(afya_home, tiny)
    yield running
    running.child.kill()
    running.child.wait()
    running.reader.join()
    assert running.child.stdout is not None
    running.child.stdout.close()


def test_training_stands_still_within_a_second_while_the_kiosk_answers(afya_home: Path, steps: Steps) -> None:
    steps.after(0.0)
    inbox = Inbox(afya_home)
    inbox.put("a question")
    asked = time.monotonic()
    assert inbox.get() == "a question"
    time.sleep(3.0)
    answered = time.monotonic()
    threading.Thread(target=inbox.get, daemon=True).start()  # the engine waits for the next question
    went_on = steps.after(answered)
    inbox.put(None)
    last = max(t for t in steps.times if t < answered)
    print(f"stood still {last - asked:.3f} s after the question, went on {went_on - answered:.3f} s after the answer")
    assert steps.between(asked + 1.0, answered) == 0
    assert went_on - answered < 1.0
    assert steps.between(0.0, asked) > 0


def test_the_mark_of_a_kiosk_that_was_killed_holds_nothing_up(afya_home: Path, steps: Steps) -> None:
    steps.after(0.0)
    program = f"from kiosk.busy import Inbox; from pathlib import Path; i = Inbox(Path({str(afya_home)!r})); "
    program += "i.put(1); i.get(); print('held', flush=True); import time; time.sleep(60)"
    kiosk = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert kiosk.stdout is not None and kiosk.stdout.readline() == "held\n"
    assert Courtesy(afya_home).asking()
    time.sleep(1.5)
    kiosk.send_signal(signal.SIGKILL)
    kiosk.wait()
    kiosk.stdout.close()
    killed = time.monotonic()
    assert (afya_home / "run/asking").exists() and not Courtesy(afya_home).asking()
    assert steps.after(killed) - killed < 1.0


def test_looking_changes_nothing(afya_home: Path) -> None:
    assert not Courtesy(afya_home).asking() and not (afya_home / "run").exists()


def test_it_may_stand_still_after_every_layer_forwards_and_before_it_backwards() -> None:
    import torch

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(5))

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                values = layer(values)
            return values

    model, calls = Stack(), []
    between_layers(model, lambda: calls.append(len(calls)))
    out = model(torch.ones(2, 4))
    assert len(calls) == 5
    out.sum().backward()
    assert len(calls) == 10


def test_a_home_without_room_for_the_mark_still_answers(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    inbox = Inbox(tmp_path)
    inbox.put(1)
    assert inbox.get() == 1 and not Courtesy(tmp_path).asking()


def test_waiting_ends_with_the_time_for_training(afya_home: Path) -> None:
    inbox = Inbox(afya_home)
    inbox.put(1)
    inbox.get()
    now = [0.0]
    watch = Courtesy(afya_home, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    watch.deadline = 5.0
    with pytest.raises(TimeOver):
        watch.pause()
    assert 5.0 <= now[0] < 5.2
    watch.pause()  # told once; what is left to do is done


def test_the_deadline_holds_within_a_step_though_nobody_asks(
    afya_home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    watch = Courtesy(afya_home, clock=lambda: now[0])
    watch.deadline = 5.0
    watch.pause()
    now[0] = 5.1
    with pytest.raises(TimeOver):
        watch.pause()
    samples, start = phantoms.make(3, ["plain"], seed=2, size=48), adapters.initial(tiny, 2, 8.0, "decoder", 0)
    watch = Courtesy(afya_home)

    def late(step: int, steps: int, loss: float) -> None:
        if step == 3:
            watch.deadline = 0.0  # within the next step

    done = trainer.train(samples, tiny, start, steps=50, courtesy=watch, progress=late)
    assert done.steps == 3 and done.loss_after == done.losses[-1]
    watch = Courtesy(afya_home)

    def late_at_once(self: Gradient) -> float:
        watch.deadline = 0.0
        time.sleep(2 * LOOK)
        return self.of([[0]])

    monkeypatch.setattr(Gradient, "step", late_at_once)
    with pytest.raises(TimeOver):  # within the first step: nothing was learnt, and nothing more is computed
        trainer.train(samples, tiny, start, steps=50, courtesy=watch)


def test_the_priority_only_goes_down() -> None:
    program = "from client.courtesy import be_nice; import os; be_nice(7); be_nice(3); print(os.nice(0))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) == max(7, os.getpriority(os.PRIO_PROCESS, 0))


def test_a_kiosk_that_answers_to_the_end_leaves_the_steps_that_were_done(afya_home: Path, tiny: Path) -> None:
    inbox, start = Inbox(afya_home), adapters.initial(tiny, 2, 8.0, "decoder", 0)
    inbox.put(1)

    def say(step: int, steps: int, loss: float) -> None:
        if step == 3:
            inbox.get()

    samples, watch = phantoms.make(3, ["plain"], seed=2, size=48), Courtesy(afya_home)
    trainer.train(samples, tiny, start, steps=1)  # imports and the first use of the processor's kernels
    done = trainer.train(samples, tiny, start, steps=50, seconds=8.0, courtesy=watch, progress=say)
    assert done.steps == 3 and done.waited > 1.0
    with pytest.raises(TimeOver):
        trainer.train(samples, tiny, start, steps=8, seconds=0.2, courtesy=Courtesy(afya_home))
