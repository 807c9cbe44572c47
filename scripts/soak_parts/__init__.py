"""The parts of `scripts/soak`: a federation under faults that happen in clinics, and a bad line to put before one."""
