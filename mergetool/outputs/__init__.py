"""What a finished run leaves: its folder and how it gets its name, the lock, the card, and looking at it again."""
