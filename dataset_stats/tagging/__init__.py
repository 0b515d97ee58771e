"""Text to tagged words, as NLTK does it: tokens by table look-up, tags by a compiled perceptron or a lexicon."""
