"""What goes to the Hugging Face Hub and comes from it."""
