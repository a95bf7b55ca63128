"""The web demo as a Hugging Face Space: the page of `vitadapter-zoo serve`, for visitors."""

import vitadapter_zoo.web

# A Space can download a larger model while it is built: `vitadapter-zoo download NAME`.
demo = vitadapter_zoo.web.build()

if __name__ == "__main__":
    demo.launch(server_name="0.0.0.0", max_file_size="20mb")  # noqa: S104  a Space is public
