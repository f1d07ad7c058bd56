"""What a run came to, read from its folder. Imports nothing else of difftune."""
