"""A world small enough to run the whole house on two CPU cores: scenes, wording, embedded models, judge."""
