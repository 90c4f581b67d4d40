"""The page on which one draws and looks into a net."""
