"""Which trained models there are, what a user may call them, and what is known of each."""
