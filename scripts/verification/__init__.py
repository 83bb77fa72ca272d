"""What a folder holds, and whether it is complete and undamaged."""
