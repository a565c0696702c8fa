"""What is compared for each kind of recorded case: one small module per subject."""
