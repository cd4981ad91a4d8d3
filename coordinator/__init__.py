"""What runs on the server: it plans rounds and only ever hears sums."""
