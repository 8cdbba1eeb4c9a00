"""What is typed: `main.py` has the table of verbs, and each verb is a file."""
