"""Does the model still answer right when it reads sparsely?"""
