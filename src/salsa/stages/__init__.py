"""A stage is a job: plain data that knows its identity and how to run. Importing this package loads no torch."""
