"""What Label Studio's ML backend protocol needs beside its routes: configurations, regions, answers, pictures."""
