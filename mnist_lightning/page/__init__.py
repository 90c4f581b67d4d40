"""The page to draw on, which shows the inside of a net."""
