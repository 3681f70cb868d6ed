"""What comes after training: prediction, exports for other engines, and evaluation reports."""
