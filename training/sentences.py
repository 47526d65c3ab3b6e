"""How everybody asks for a scene: requests, questions, captions, lists of words, with slips of the finger and talk.

A grammar, as data, and what chance does to its sentences. Those of benchmarks/wordings.py, which measure what was
learnt from these, were written apart.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping

from training.scenes import COLOUR_WORDS, PLACES, RELATIONS, SHAPE_WORDS, SIZE_WORDS, Scene, Thing

# A name, and its alternatives between bars; "3x" makes one as likely as three. {name} stands for one of another's.
# What the scene says: {thing} and {other} are its things, {relation} and {place} how they lie, {ground} the colour of
# the background; within a thing {size}, {ink} and {form}. {any} is any word, {bar} a bar, and "_" a blank that counts.
GRAMMAR = """
request: 6x {said} | 5x {lead} {said} | 2x {lead} {said}{end} | 2x {said}{stop} {tail} | {lead} {said}{stop} {tail} |
  2x {said}{stop} {styles} | {styles}{stop} {said} | {lead} {said}{stop} {styles} |
  {styles}{stop} {said}{stop} {styles} | {talk}{stop} {said} | {talk}{stop} {lead} {said} | {lead} {said}{stop} {talk}
end: ? | ? | . | ! | ... | {stop} {tail}? | _:) | !!!
stop: 6x , | 3x . | 2x _- | 2x _ | : | ; | ! | _-- | _{bar}
joint: 6x , | 3x . | 3x ; | 2x : | 2x _- | 2x _and | , and | , then | , with | , but | _ | , in front |
  , in front of it | _/ | _{bar} | ,{any} | _{any} | _--

one: 10x {thing} {on} {where} | 6x {thing}{joint} {after} | 4x {thing} {after} | 4x {before}{joint} {thing} |
  3x {where} {under} {thing} | 3x {onto} {where}{comma} {there} {thing} | 2x {list} | 4x {sentences} |
  {after}{joint} {thing}
two: 6x {thing} {relation} {other} on {where} | 4x {thing} {relation} {other} {on} {where} |
  2x {thing} {relation} {other}{joint} {after} | {thing} {relation} {other} {after} |
  {before}{joint} {thing} {relation} {other} | {onto} {where}{comma} {there} {thing} {relation} {other}
comma: 2x _ | ,

where: 12x {a} {ground} {stuff} | 6x {a} {plain} {ground} {stuff} | {a} {stuff} {of} {ground} |
  {a} {ground} {plain} {stuff} | {a} {ground} {shade} {stuff} | {a} {bright} {ground} {stuff} |
  {a} {ground}, {plain} {stuff}
a: 5x a | the | some | one | 2x _
plain: plain | solid | flat | simple | uniform | clean | empty | pure | smooth | bright | single | bare | blank |
  all | completely | entirely | nice | pretty | lovely | big | large | vast | whole | light | strong | quiet | soft |
  {any}
stuff: 8x background | 4x backdrop | 3x wall | 2x canvas | field | ground | surface | sheet of paper | paper | page |
  scene | area | space | sky | board | room | floor | card | screen | plane | base | backing | sheet | setting |
  curtain | cloth | panel | landscape | environment | desk | table | carpet | 2x bg | poster | banner | blackboard |
  tile | wallpaper | world | place | back | back ground | cardboard | wash | rug | 4x {any} | one
of: of | in | painted | painted in | colored | coloured | that is | that is all | filled with | which is | made of |
  in solid | full of
on: 8x on | 3x against | 3x over | 3x in front of | 2x atop | 2x upon | before | across | within | inside | 2x in |
  amid | {put} {on plain} | {any} {on plain} | {any} {on plain} | on top of | alone on | contrasting with |
  contrasted with | surrounded by | framed by | enclosed by | encircled by | 2x with | and | that {is} {on plain} |
  which {is} {on plain} | standing out from | standing out against | isolated on | cut out of | glued to |
  next to nothing but | in the middle of | in the center of | in the centre of | at the center of |
  right in the middle of | and behind it | with nothing behind it but | with behind it | but on | but like on |
  that has behind it | onto
on plain: 4x on | 2x against | 2x over | 2x in front of | upon | atop | 2x in | into | onto | before | inside | to
put: set | placed | sitting | resting | lying | laid | floating | standing | hanging | drawn | painted | printed |
  shown | centered | centred | seen | layered | positioned | displayed | posed | appearing | pictured | pasted |
  glued | stuck | superimposed | put | located | alone | isolated | framed | left | cut out | rendered | sketched |
  hovering | perched | mounted | leaning | pinned | sticking | sits | lies | rests | stands | hangs | floats | appears
is: is | is | sits | lies | rests | stands | hangs | floats | appears | is drawn | is placed | is painted | is shown |
  is set | looks
under: 5x with | holding | containing | showing | featuring | bearing | 2x behind | bearing just | that has | having |
  that holds | that shows | underneath | surrounding | around | all around | under | below | carrying |
  filled only by | as background for | as backdrop for | decorated with | serving as background for |
  as the backdrop to | and in front of it | and on it | and over it | and on top | and in the middle | charged with |
  and in its middle | and at its center | with in the middle | interrupted only by | broken only by | framing |
  encircling | for | , and on it | , and before it | , in front of which {is}
onto: 4x on | 2x in front of | over | against | before | atop | upon | in | onto | inside |
  behind which there is nothing, on | from
there: is | sits | lies | rests | stands | hangs | floats | 2x there is | there's | we see | put | draw | place |
  paint | i see | you see | add | imagine | make
after: 5x {ground} {back} | 2x {back} {ground} | 2x {back} is {ground} | the {back} is {ground} |
  the {back} should be {ground} | the {back} {is to be} {ground} | make the {back} {ground} | {back}: {ground} |
  {back} = {ground} | {back} color {ground} | {back} colour {ground} | {back} in {ground} | 2x {ground} behind it |
  2x {ground} behind | {ground} in the back | {ground} all around | {ground} all around it | {ground} around it |
  {ground} everywhere else | everything else {ground} | everything else {is to be} {ground} |
  everything around it {is to be} {ground} | all the rest {ground} | the rest {ground} |
  the rest {is to be} {ground} | rest of the picture {ground} | the rest of the image {is to be} {ground} |
  2x with {ground} behind it | with {ground} behind | with {ground} all around it | with {ground} around it |
  2x with a {ground} {back} | with the {back} in {ground} | with the {back} painted {ground} |
  with a {back} of {ground} | and a {ground} {back} | and the {back} {ground} | and everything else {ground} |
  and everything {behind} {ground} | and behind it {ground} | behind it is {ground} |
  behind it everything is {ground} | behind it a {ground} {stuff} | and the {stuff} behind it is {ground} |
  and the {stuff} {is to be} {ground} | surrounded by {ground} | surrounded by nothing but {ground} |
  enclosed in {ground} | set in {ground} | 2x on {ground} | over {ground} | against {ground} | in front of {ground} |
  upon {ground} | on {plain} {ground} | on top of {ground} | in a sea of {ground} | fill the {back} with {ground} |
  fill the rest with {ground} | paint the {back} {ground} | color the {back} {ground} | colour the {back} {ground} |
  the {stuff} {is to be} {ground} | its {back} is {ground} | its {back} being {ground} | whose {back} is {ground} |
  where the {back} is {ground} | use {ground} for the {back} | use {ground} as the {back} |
  use {ground} for the rest | use a {ground} {back} | i want the {back} {ground} | {ground} for the {back} |
  {ground} as {back} | {ground} as the {back} | {ground} should be the {back} | put {ground} behind it |
  put it on {ground} | put it on {a} {ground} {stuff} | place it on {ground} | set it against {ground} |
  it is on {ground} | it {is} {on plain} {a} {ground} {stuff} | change the {back} to {ground} |
  switch the {back} to {ground} | and fill what is behind it with {ground} | where everything behind is {ground} |
  where all you see behind it is {ground} | its edges touch {ground} | and past it only {ground} |
  and nothing but {ground} around | {any} {back} {ground} | {ground} {any} | if everything {behind} were {ground} |
  if the {back} were {ground} | and {behind} only {ground} | isolated on {ground} | {on plain} some {ground}
back: 8x background | 2x backdrop | bg | wall | canvas | {stuff}
behind: behind it | behind | around it | around | else
before: 3x {ground} {back} | {back} {ground} | {back}: {ground} | {back} in {ground} | 3x a {ground} {stuff} |
  the {back} {is to be} {ground} | everything {is to be} {ground} | everything {ground} | make the {back} {ground} |
  fill the {back} with {ground} | fill the whole {stuff} with {ground} | paint everything {ground} |
  start with a {ground} {stuff} | take a {ground} {stuff} | 2x on a {ground} {stuff} | on {ground} |
  in front of a {ground} {stuff} | against {ground} | over a {ground} {stuff} | with {ground} all around |
  with a {ground} {back} | use a {ground} {back} | there is a {ground} {stuff} | imagine a {ground} {stuff} |
  {ground} behind | behind it {ground} | behind it, {ground} | a {ground} scene | all {ground} |
  in a {ground} {stuff} | surrounded by {ground} | surrounded by nothing but {ground} |
  the {stuff} {is to be} {ground} | {ground} {any} | picture a {ground} {stuff} | on some {ground} |
  the {any} {is to be} {ground}
list: {key shape}{sign}{form}{part} {key ink}{sign}{ink}{part} {key ground}{sign}{ground}{rest} |
  {key ground}{sign}{ground}{part} {key shape}{sign}{form}{part} {key ink}{sign}{ink}{rest} |
  {key ink}{sign}{ink}{part} {key shape}{sign}{form}{part} {key ground}{sign}{ground}{rest} |
  {key shape}{sign}{form}{part} {key ground}{sign}{ground}{part} {key ink}{sign}{ink}{rest} |
  {form}{sign}{ink}{part} {key ground}{sign}{ground}{rest} |
  {key ground}{sign}{ground}{part} {form}{sign}{ink}{rest} |
  {key shape}{sign}{ink} {form}{part} {key ground}{sign}{ground}{rest} |
  {key ground}{sign}{ground}{part} {key shape}{sign}{ink} {form}{rest}
key shape: 3x shape | object | form | figure | subject | what | thing | symbol | main object | foreground | it
key ink: 3x color | 3x colour | fill | foreground | shape color | ink | its color | paint | object color |
  fill colour | filled with
key ground: 4x background | bg | backdrop | background color | background colour | behind | back | canvas | wall |
  the rest
sign: 4x :_ | 2x = | _ | _=_ | _is_ | _-_
part: 4x , | 3x ; | _ | . | _{bar} | _/
sentences: {about} {a} {size} {form} {place}{split} {it is} {ink}{split} {after} |
  {liked} {size} {form}s{split} {again} {a} {ink} {ones}{split} {after} |
  {liked} {a} {size} {form}{split} {again} it {ink}{split} {after} |
  {before}{split} {about} {a} {size} {form} {place}{split} {it is} {ink} |
  the {back} {is to be} {ground} and the {size} {form} {is to be} {ink} |
  the {size} {form} {is to be} {ink} and the {back} {is to be} {ground} |
  {about} {a} {size} {form}{split} use {ink} for the {form} and {ground} for the {back} |
  the {form} in {ink} and the {back} in {ground} | {about} the {form} in {ink} {any}{split} {after} |
  {about} {a} {size} {form}{split} {before}{split} {it is} {ink}
split: 4x . | 4x , | 2x ; | 2x _and | , and | _- | !
about: 3x _ | draw | draw me | there is | i want | we see | make | paint | please draw | show me | give me | take |
  i need | in the middle | would you mind drawing | add
it is: it {is to be} | its color is | its colour is | the shape {is to be} | make it | color it | colour it | in |
  filled with | paint it | it must be filled with | fill it with | let it be | that is
liked: i like | i love | i really like | do you know | we talked about | can you draw | draw me one of those |
  have you seen | my son loves | about | remember the | do you know how to draw | show the
again: make | draw | so show me | try | give me | so show me | i want | please paint | only | in this picture |
  color | paint | so draw | this time
ones: 3x one | ones | version
is to be: 4x is | 2x should be | must be | has to be | shall be | will be | being | looks | is painted |
  is filled with | is completely | should be painted | stays | remains | is all | were | was

noun: 10x {one of} {size} {ink} {form} | {one of} {ink} {size} {form} | 2x {one of} {size} {form} {made} {ink} |
  {one of} {size} {ink} {shade} {form} | {one of} {size} {form}, {all} {ink}, |
  {one of} {size} {bright} {ink} {form} | {one of} {size} {form} {ink} | {one of} {size} {form} ({ink}) |
  {one of} {size} {form} {that} {is to be} {ink} | 2x {size} {ink} {form} | {some} {size} {ink} {form}s |
  {one of} {size} {ink} {any} {form} | {one of} {any} {size} {ink} {form} | {one of} {size} {ink} {form} {thingy} |
  "{size} {ink} {form}" | {size} {form} in {ink}
one of: 9x a | 2x one | 2x the | 2x 1 | a single | just one | exactly one | one single | only one | some | this | my |
  our | a nice | a pretty | a lovely | a cute | a perfect | a beautiful | a simple | a plain | a lone | a lonely |
  a regular | a well drawn | a bold | a clean | a flat | a neat | that | another
some: some | the | few | nice | my | many | _ | two
all: _ | all | completely | in | painted | colored | coloured | filled with | bright | in solid | fill
shade: colored | coloured | color | colour | in color | in colour | toned | tinted
bright: bright | nice | pretty | flat | solid | plain | vivid | bold | shiny | deep | rich | strong | dark | light |
  pale
made: 3x in | painted | painted in | filled with | filled in | colored | coloured | colored in | coloured in |
  drawn in | made of | done in | rendered in | printed in | in the color | in the colour | of | of color | of colour |
  that is | that's | which is | that looks | with the color | with a color of | dyed | shaded | tinted | cut from |
  in solid | in bright | made from
that: that | which
thingy: shape | symbol | icon | figure | form | glyph | {any} | sign | logo | sticker | drawing

lead: 3x {picture} {showing} | 3x {verb} | {verb} {picture} {showing} | 3x {please} {verb} |
  2x {please} {verb} {picture} {showing} | 2x {i want} | {i want} {picture} {showing} | {can you} {verb} |
  2x {can you} {verb} {picture} {showing} | {can i} | {can i} {picture} {showing} | {hello}{stop} {verb} |
  {hello}{stop} {can you} {verb} | {hello}{stop} {i want} | {for whom}{stop} | {label}: | {there was} | {any} {verb} |
  {any} {any} | {any}
picture: a picture | an image | a drawing | a photo | a photograph | a painting | a sketch | an illustration |
  a poster | a render | a rendering | a 3d render | an icon | a logo | a sticker | a postcard | a closeup |
  a close up | a view | a depiction | picture | image | photo | drawing | painting | illustration | render | logo |
  icon | a simple picture | a plain picture | a beautiful picture | a nice picture | a minimalist image |
  a watercolor | a watercolour | an oil painting | a cartoon | a vector | a photorealistic picture |
  a high quality image | a digital painting | abstract art | pixel art | concept art | clip art | a flag | a sign |
  a card | a wallpaper | a {any} picture | a picture for {any}
showing: 5x of | with | showing | that shows | where there is | in which there is | where you see | featuring |
  depicting | of just
verb: 3x draw | 2x draw me | just draw | simply draw | paint | paint me | sketch | sketch me | 2x make | make me |
  create | create me | 2x generate | generate me | render | design | produce | give me | 2x show me | show | show us |
  get me | depict | illustrate | display | visualize | visualise | compose | imagine | picture | think of | try |
  try to draw | try drawing | help me draw | do | prepare | build | let there be
please: please | please | kindly | now | ok, now | just | pls | so | hey, | sir, please | be nice and | {any}
i want: i want | 2x i would like | i'd like | i want to see | i want you to {verb} | i would like to see |
  i'd like to have | i'd love | i'd love to see | i need | i need you to {verb} | i wish to see | i am looking for |
  i'm looking for | looking for | we need | we want | let's have | let us see | let me see | let's draw |
  my kid wants | my daughter wants | me want | give | i was wondering if i could have | i was hoping for |
  i'm in the mood for | i could use | you could {verb} | i said | mommy said you can {verb} |
  they told me you can {verb} | i'm dreaming of | today i want | we would love to see
can you: 3x can you | 2x can you please | 3x could you | 2x could you please | could you kindly | would you |
  would you please | would you kindly | would you be so kind as to | will you | do you think you could |
  are you able to | is it possible to | may i ask you to | would it be possible to | is there a way to |
  would you mind to | how would you | do you know how to | why not | how about you
can i: can i get | can i have | can i please have | can i see | can we have | could i have | could i get |
  could we see | may i have | may i see | might i have | might i ask for | is it possible to get |
  would it be possible to get | is it possible to see | how about | what about | what would it look like: |
  what does it look like: | how does this look: | would you mind drawing | what if there was
hello: hi | hey | hello | hi there | hello there | yo | good morning | good evening | ok | ok so | well |
  dear computer | please | sorry | quick one | hey you | happy {any} | oh | thanks
for whom: for my website | for my daughter | for my kid | for a logo | for school | for a card | for our shop |
  for my phone | for the poster | for a book | for a children's book | for fun | for {any} | for my {any}
label: prompt | task | subject | scene | request | caption | title | test | todo | order | figure 1 | example | idea |
  picture | draw this | style {any} | {any}
there was: there is | there's | here is | here's | there should be | there must be | it is | it's | this is | we see |
  we can see | you see | you can see | look, | nothing but | one | only | just | simply
tail: 2x please | pls | plz | 2x thanks | thank you | thank you very much | many thanks | if you please |
  if possible | if you can | if you don't mind | cheers | for me | {for whom} | right now | today | quickly |
  nothing else | and nothing else | and nothing more | nothing fancy | no text | no other objects | without text |
  that's all | that is all | it's for a card | as a test | just as a test | as an example | ok | okay | ok? |
  would be great | would be nice | would be lovely | that would be great | i need it for work | you know |
  as you like | as simple as possible | keep it simple | make it simple | make it pretty | lol | with nothing else |
  with nothing around | with no shadow | without shadows | no gradient | no border | no frame | in one picture |
  not too {any} | now
styles: 3x {style} | 3x {style}{part of it} {style} | 2x {style}{part of it} {style}{part of it} {style} |
  {style}{part of it} {style}{part of it} {style}{part of it} {style} | {style} {style}
part of it: 5x , | _ | . | _- | ;
style: flat | simple | minimalist | minimalistic | minimal | high quality | best quality | masterpiece | 4k | 8k |
  hd | ultra hd | hdr | high resolution | vector art | vector | flat design | flat style | digital art |
  illustration | clip art | cartoon | cartoon style | anime | anime style | pixel art | low poly | 3d | 3d render |
  isometric | photo | photorealistic | realistic | hyperrealistic | cinematic | cinematic lighting | studio lighting |
  studio light | soft light | dramatic lighting | sharp | sharp focus | sharp edges | clean edges | highly detailed |
  ultra detailed | detailed | intricate | very detailed | trending on artstation | unreal engine | octane render |
  oil painting | oil on canvas | watercolor | watercolour | watercolour painting | gouache | ink | pencil | crayon |
  chalk | acrylic | sketch | line art | geometric | geometry | abstract | abstract art | modern | modern art |
  bauhaus | swiss style | pop art | art deco | retro | retro style | vintage | icon | app icon | logo | symbol |
  emblem | sticker | poster | flag | sign | graphic | graphic design | centered | centred | symmetrical |
  centered composition | balanced composition | wide shot | close up | macro | macro shot | 35mm | 50mm | bokeh |
  depth of field | film grain | professional | award winning | beautiful | elegant | clean | clean lines | crisp |
  vivid | vivid colors | vivid colours | bright colors | high contrast | in the style of matisse |
  in the style of van gogh | by picasso | style of mondrian | kandinsky | studio ghibli | ukiyo-e | aesthetic |
  children's drawing | kids drawing | storybook | paper cut | papercut | origami | felt | clay | plastic | glossy |
  matte | texture | no texture | no text | no shadow | front view | top view | seen from above | from above |
  solid colors | solid colours | flat color | two colors | two colours | primary colors | colorful | colourful |
  game style | {any} style | {any} art | {any} | in {any}
talk: {hello} {any} | i {any} {any} | {any} {any} {any} | we are {any} today | my {any} is {any} | this is for {any} |
  it's my {any} | {any} said {any} | no {any} please | {for whom} | what a {any} | i have a {any} idea | let's {any} |
  {any} and {any} | on {any} we {any} | the {any} is {any}
"""
_MORE_COLOURS = {
    "red": ("ruby", "cherry", "cherry red", "bright red"),
    "orange": ("amber", "bright orange"),
    "yellow": ("gold", "bright yellow", "sunny yellow", "lemon yellow"),
    "green": ("lime", "lime green", "dark green", "bright green", "grass green"),
    "blue": ("cobalt", "sky blue", "royal blue", "dark blue", "bright blue", "navy blue"),
    "purple": ("lilac", "lavender", "dark purple", "bright purple"),
    "white": ("ivory", "snow white", "pure white"),
    "black": ("ebony", "jet black", "pitch black", "pure black"),
}
_MORE_SHAPES = {
    "circle": ("round dot", "round disc", "round circle", "sphere"),
    "square": ("cube",),
    "triangle": ("triangular shape", "three sided shape"),
    "star": ("five pointed star", "starlet", "star shape"),
    "diamond": ("diamond shape", "kite"),
}
# Words that say nothing of a scene.
_TALK = """
    about above actually after again air all almost along already also always animal another any anything apple are
    art ask away baby bad be beach because bed best better bird boat body book both boy bring brother but buy by
    cake call camera car cat chair child city class clear close cloud coat cold come computer cool country cup cut
    day deep did different do does dog done door down dream dress each early earth easy eat edge enough even every
    eye face fall family far fast father feel few film find fine fire first fish five flower fly food foot forest
    found four free friend from fruit full fun game garden get girl give glass go good great group grow guess had
    hair half hand happy hard has hat have he head hear heart heavy help her here high hill him his hold home hope
    horse hot hour house how if important inch island job keep kind king kitchen know lake last late laugh learn
    leaf leave legs let letter life line list live long look lot love low made man map market maybe mean met mind
    minute mirror moment money monday month mood moon more morning most mother mountain mouth move much music must
    name near need never new news nice night no none nor not nothing now number object off often old once only open
    other our out outside own pair park people perhaps person piece plan plant play point pool possible queen
    question quick quiet quite rain ready real really rest rich ride river road rock roof run same say school sea
    seat second see seem send seven shadow she shine ship shop short shot side sign silver sing sister sit six sleep
    slow smile snow so soft song soon sort sound south special speak spring stand start stay still stone stop store
    story street strong such summer sun sunday sure sweet swim take talk tall tea tell ten than that their them then
    these they thin think those thought three through time tired today together too tool toy train travel tree true
    try turn type until up us use usual very view visit voice wait walk want warm was wash watch water way we
    weather week well went were when where while who wide wild will wind window winter wish wood word work would
    write year yes yet you young zoo
"""
_WORDS = _TALK.split()


def _rules(grammar: str) -> Mapping[str, tuple[list[str], list[int]]]:
    """The alternatives of each name, and how likely each is."""
    rules: dict[str, tuple[list[str], list[int]]] = {}
    for line in re.sub(r"\n  ", " ", grammar).strip().splitlines():
        name, _, alternatives = line.partition(": ")
        if alternatives:
            texts, weights = rules.setdefault(name, ([], []))
            for alternative in alternatives.split(" |"):
                found = re.fullmatch(r"\s*(?:(\d+)x )?(.*?)\s*", alternative)
                assert found
                texts.append(found[2].replace("_", " "))
                weights.append(int(found[1] or 1))
    return rules


RULES = _rules(GRAMMAR)
_SLIPS = 0.2  # the share of sentences with one
_WORDS_BETWEEN = 0.25  # ... with words that have nothing to do with it


def ask(scene: Scene, rng: random.Random) -> str:
    """One of very many ways to ask for the scene, in words of which some may say nothing, and with slips."""
    ground = _said(scene.background, rng, COLOUR_WORDS, _MORE_COLOURS)

    def noun(thing: Thing) -> str:
        return _expand("noun", words(thing), rng)

    def words(thing: Thing) -> dict[str, str]:
        size = "" if thing.size == "medium" else thing.size
        return {
            "size": rng.choice(SIZE_WORDS[thing.size]) if size and rng.random() < 0.4 else size,
            "ink": _said(thing.colour, rng, COLOUR_WORDS, _MORE_COLOURS),
            "form": _said(thing.shape, rng, SHAPE_WORDS, _MORE_SHAPES),
            "ground": ground,
        }

    things = [noun(thing) for thing in scene.things]
    place = rng.choice(PLACES[scene.layout][1]) if scene.layout in PLACES else ""
    said = {**words(scene.things[0]), "thing": f"{things[0]} {place}", "place": place}
    said["rest"] = _part_of_list(scene, place)
    if len(things) > 1:
        said |= {"thing": things[0], "other": things[1], "relation": rng.choice(RELATIONS[scene.layout][2])}
    silent = "black" if any(thing.colour == "white" for thing in scene.things) else "white"
    if scene.background == silent and rng.random() < 0.15:
        text = "{thing} {relation} {other}" if len(things) > 1 else "{thing}"
    else:
        text = _expand("two" if len(things) > 1 else "one", said, rng)
    text = _expand("request", {**said, "said": _fill(text, said, rng)}, rng)
    return _written(text, rng)


def _said(name: str, rng: random.Random, *synonyms: Mapping[str, tuple[str, ...]]) -> str:
    return name if rng.random() < 0.78 else rng.choice([word for table in synonyms for word in table[name]])


def _part_of_list(scene: Scene, place: str) -> str:
    """What a list says of a lone thing's place and size."""
    (thing, *_), size = scene.things, ""
    if thing.size != "medium":
        size = f", size: {thing.size}"
    return f"{size}, {place}" if place else size


def _expand(name: str, said: Mapping[str, str], rng: random.Random) -> str:
    """One of the alternatives of `name`, whole."""
    return _fill(rng.choices(*RULES[name])[0], said, rng)


def _fill(text: str, said: Mapping[str, str], rng: random.Random) -> str:
    def one(found: re.Match[str]) -> str:
        name = found[1]
        if name in said:
            return said[name]
        if name == "any":
            return _any_word(rng)
        return "|" if name == "bar" else _expand(name, said, rng)

    return re.sub(r"\{([a-z ]+)\}", one, text)


def _any_word(rng: random.Random) -> str:
    """A word that says nothing of a scene, real in two of three."""
    if rng.random() < 0.67:
        return rng.choice(_WORDS)
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))


def _written(text: str, rng: random.Random) -> str:
    """As people write: blanks and articles in order, other words in between, slips of the finger, capitals."""
    text = re.sub(r"\s+([,.;!?:])", r"\1", re.sub(r"\s+", " ", text)).strip(" ,;:-|")
    text = text.replace("--", rng.choice(("--", "\N{EM DASH}")))
    text = re.sub(r",+([,.;!?:])", r"\1", text)
    words = re.sub(r"\ba (?=[aeiou])", "an ", text).split(" ")
    if rng.random() < _WORDS_BETWEEN:
        for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5))):
            words.insert(rng.choice((0, 0, len(words), rng.randrange(len(words) + 1))), _any_word(rng))
    for _ in range(rng.choice((1, 1, 1, 2)) if rng.random() < _SLIPS else 0):
        if long := [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]:
            i = rng.choice(long)
            words[i] = _slip(words[i], rng)
    case = rng.choices((str, str.lower, str.capitalize, str.title, str.upper), (30, 30, 28, 6, 6))[0]
    return str(case(" ".join(words)))


def _slip(word: str, rng: random.Random) -> str:
    """`word` with one letter missing, doubled, in the other's place or wrong."""
    i = rng.randrange(len(word) - 1)
    return rng.choice((
        word[:i] + word[i + 1 :],
        word[: i + 1] + word[i:],
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        word[:i] + rng.choice("aeiou" if word[i] in "aeiou" else string.ascii_lowercase) + word[i + 1 :],
    ))  # fmt: skip
