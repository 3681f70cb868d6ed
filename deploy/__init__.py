"""What comes after training: prediction, and the files that other engines run."""
