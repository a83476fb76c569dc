"""Publishing: model card, plots and the folder that is pushed."""
