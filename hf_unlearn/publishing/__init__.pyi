from .card import render_card as render_card
from .card import write_card as write_card
from .model_folder import push_unlearned_model as push_unlearned_model
from .plots import save_plots as save_plots
