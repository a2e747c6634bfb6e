"""dsr1kit: which way to DeepSeek R1 works for me, how good and fast is it, what does it cost."""
