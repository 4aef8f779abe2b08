"""What a cache is tested with."""
