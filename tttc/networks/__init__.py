"""Networks that learn at test time: some weights of the last blocks take a step of descent after every chunk of tokens,
down the network's own next-token loss (End-to-End Test-Time Training, arXiv:2512.23675).

chunk_loss.py      what a chunk of tokens loses at the weights of each sequence; cross_entropy.py, of each token
inner_update.py    `tttc.sgd` on those weights, once per chunk
passes.py          all chunks of a sequence, and the meta-gradient: by its definition, and in bounded memory
end_to_end.py      the module that users hold, `tttc.nn.EndToEnd`; documents.py, causality.py what it is given
decoding.py        tokens one by one, and the state that they leave; state_file.py, sampling.py what is done with it
"""
