"""What a run folder holds: checkpoints, events, where a run resumes."""
