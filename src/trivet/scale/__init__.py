"""What a run would need on other machines: `trivet plan`. Counts first, then bytes and seconds; nothing is loaded."""
