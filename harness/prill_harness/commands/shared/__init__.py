"""What several commands say, ask and write alike."""
