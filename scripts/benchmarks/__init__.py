"""One module per benchmark; `main(argv)` parses, measures, prints and returns the numbers."""
