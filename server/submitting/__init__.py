"""From what a client sends to a job: checked, estimated, resumed, run again."""
