"""A trained model in the form in which other programs and browsers run it."""
