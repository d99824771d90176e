"""The initial prompts of training, one file a kind; `registry` finds them by name."""
