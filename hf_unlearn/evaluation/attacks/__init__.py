"""Attacks on an unlearned model: can what was forgotten be brought back, or told from what was never seen?"""
