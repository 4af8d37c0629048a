"""Small named bugs, by what they are in; every module here declares some."""
