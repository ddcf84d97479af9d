"""What is done with a published model: predict, evaluate, serve, export, a Space, and conversion from other code."""
