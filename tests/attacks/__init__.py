"""What hostile code tries: each attack is shown to succeed where nothing is isolated, and to fail in Proctor's sandbox."""
