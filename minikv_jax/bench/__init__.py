"""What `minikv bench` runs."""
