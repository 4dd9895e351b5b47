"""Other tools' dumps of hidden states, looked at for the faults that they are known for: which layout, its samples, the checks."""
