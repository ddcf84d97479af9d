"""What is said of a run afterwards: the model card, its pictures and tables, and reports of published models."""
