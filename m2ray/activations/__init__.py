"""The run folder: its records and the schema of a part, which `writing` and `reading` share."""
