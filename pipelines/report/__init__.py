"""`ldm report`: one page over one run or several side by side."""
