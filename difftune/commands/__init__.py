"""What the commands do, a file each or a few together; the command line imports the one that it runs."""
