"""What outlives one run: the history of gates, the log of incidents, and the files of both and of waivers."""
