"""Make your own: training from scratch and tuning."""
