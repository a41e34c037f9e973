"""The one charting library of the pages: uPlot 1.6.32 (MIT), shipped whole, so that a page fetches nothing."""
