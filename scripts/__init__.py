"""Programs of the repository itself: the demo, the tests, the checks. Not part of the installed package."""
