"""The registry behind README's table of kinds: what works, what is refused and which test shows it."""
