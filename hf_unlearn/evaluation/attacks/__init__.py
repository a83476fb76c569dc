"""Attacks on an unlearned model: can forgotten rows be recovered, or told apart from rows that were never seen?"""
