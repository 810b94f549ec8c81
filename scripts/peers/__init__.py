"""Two engines side by side: a process each, the same prompts, taking turns."""
