"""Small named bugs, sorted by what they are in; every module here declares some."""
