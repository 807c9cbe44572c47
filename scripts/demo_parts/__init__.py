"""The parts of `scripts/demo`: clinics and their cases, jobs that train and answer, and the report."""
