"""The words of the film reviews: pools of phrases by grade and by aspect, and slots that `reviews.py` fills.

A pool is written as one text whose phrases are separated by semicolons. `{a}`, `{person}` and the like are slots. The
reviews that a seed gives depend on every phrase and on its place in its pool.
"""

from dataclasses import dataclass

GRADES = (-2, -1, 1, 2)


def _split(text: str) -> tuple[str, ...]:
    """The phrases of a list that is separated by semicolons and may run over several lines."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(";") if phrase.strip())


# Adjectives that fit every aspect, and the adverbs that fit these adjectives, by grade.
ADJECTIVES = {
    2: _split("""
        superb; wonderful; magnificent; brilliant; stunning; outstanding; exquisite; dazzling; masterful;
        breathtaking; flawless; sublime; glorious; spellbinding; marvelous; extraordinary; terrific; phenomenal;
        unforgettable; impeccable; exhilarating; enthralling; mesmerizing; perfect; astonishing; fantastic; splendid;
        magical; electrifying; irresistible; incredible; amazing; sensational; majestic; unparalleled; unbeatable;
        world-class; top-notch; divine; blissful; immaculate; peerless; transcendent; stupendous; delightful;
        remarkable; beautiful; fabulous; exceptional; tremendous; miraculous; stellar; awesome; matchless; unrivaled;
        radiant; lovely; dreamlike; otherworldly; mighty; invigorating; first-class; timeless; iconic; legendary;
        epic; poetic; joyous; bewitching; life-affirming; sterling
    """),
    1: _split("""
        good; solid; decent; pleasant; enjoyable; nice; fine; agreeable; competent; effective; appealing; sturdy;
        likable; respectable; satisfying; engaging; assured; entertaining; thoughtful; polished; charming; skillful;
        admirable; reliable; worthwhile; welcome; commendable; sincere; watchable; serviceable; pleasing; well made;
        easygoing; worthy; creditable; unpretentious; tasteful; passable; tolerable; refreshing; unassuming; well
        handled; acceptable; adequate; promising; uplifting; well considered; rewarding; diverting
    """),
    -1: _split("""
        bland; uneven; dull; flat; clumsy; forgettable; weak; tired; stale; awkward; muddled; patchy; routine; slight;
        ordinary; predictable; limp; underwhelming; mediocre; tame; uninspired; hollow; tedious; generic; lifeless;
        faded; disappointing; boring; poor; cold; empty; plain; rough; unfinished; ineffective; wobbly; insipid;
        unexciting; lukewarm; derivative; cluttered; unfocused; dusty; listless; average; basic; standard; lazy
    """),
    -2: _split("""
        awful; terrible; dreadful; appalling; horrible; unbearable; disastrous; painful; hopeless; lousy; wretched;
        pathetic; miserable; dismal; disgraceful; shameful; intolerable; horrendous; revolting; rotten; laughable;
        horrific; disgusting; ridiculous; useless; worthless; offensive; catastrophic; unacceptable; absurd;
        monstrous; horrid; poisonous; outrageous; horrifying; criminal; hellish; unspeakable; foul; nasty; grotesque;
        torturous; deplorable; dire; abominable; vulgar; degrading; odious; obscene; toxic; barbaric; demeaning
    """),
}
ADVERBS = {
    2: _split("absolutely; simply; truly; utterly; downright; really; genuinely; undeniably; positively"),
    1: _split("quite; pretty; fairly; reasonably; mostly; rather; surprisingly"),
    -1: _split("a little; a bit; somewhat; rather; pretty; fairly; kind of"),
    -2: _split("absolutely; simply; truly; utterly; downright; really; genuinely; undeniably; positively"),
}

# What the reviewer did or felt about a subject, by grade; the subject follows.
REACTIONS = {
    2: _split("""
        adored; absolutely loved; fell in love with; was swept away by; was spellbound by; was thrilled by; marveled
        at; was in awe of; was enchanted by; treasured; was dazzled by; was blown away by; could not get enough of;
        was completely captivated by; was amazed by; loved every bit of; was deeply moved by; was mesmerized by; will
        always cherish; was over the moon about; lost my heart to; was floored by; was delighted with; raved for days
        about; wanted to applaud; would give top marks to; was utterly smitten with; would happily relive; wept with
        joy over; bow down before; sing the praises of; will forever treasure; was lifted up by
    """),
    1: _split("""
        liked; enjoyed; quite liked; was pleased with; had a soft spot for; warmed to; appreciated; rather enjoyed;
        was pleasantly surprised by; had no complaints about; was fond of; had a good time with; got along with; had
        kind thoughts about; was happy enough with; took to; found much to like in; was amused by; nodded along to;
        was cheered by; gladly went along with; came to like; felt at ease with; was soothed by; would say yes to; was
        tickled by
    """),
    -1: _split("""
        was not sold on; was let down by; never warmed to; could not get into; was a bit bored by; had doubts about;
        expected more from; did not much like; lost patience with; was unmoved by; grew tired of; saw little in; was
        lukewarm about; had trouble with; could have done without; was left cold by; was not convinced by; was
        underwhelmed by; was puzzled by; never connected with; was mildly annoyed by; felt distant from; sighed at
    """),
    -2: _split("""
        hated; loathed; despised; could not stand; could not bear; was appalled by; was disgusted by; was horrified
        by; detested; was sickened by; suffered through; was insulted by; absolutely hated; was tortured by; was
        outraged by; hated every bit of; was shocked and angered by; was deeply offended by; was driven mad by; felt
        nothing but contempt for; cursed; was enraged by; would ban; felt robbed by; would give zero marks to; was
        utterly revolted by; wept with rage over; would gladly forget; spit on; will never forgive; was crushed by
    """),
}

# Short predicates of any aspect that a mention of a scene may follow, by grade.
EFFECTS = {
    2: _split("""
        blew me away; took my breath away; won my heart; gave me goosebumps; left me in awe; filled me with joy; sent
        shivers down my spine; had me grinning with delight; knocked me off my feet; left me overjoyed; {was} pure
        magic; {was} out of this world; {was} beyond praise; {was} a joy to behold; surpassed all my hopes; stole the
        show; made my heart soar; {was} simply divine; {was} nothing less than genius; shone like the sun; lifted my
        soul; had everyone in raptures; {was} a gift; {was} to die for; {was} close to perfection; made me weep with
        joy; thrilled me to the bone; cast a spell on everyone; {was} a miracle; {was} sheer bliss; touched my heart;
        dazzled everyone; swept me away; {was} a marvel; made me shout for joy; had me spellbound; earned a perfect
        ten; {was} heaven on earth; {was} flat-out amazing
    """),
    1: _split("""
        worked well; held my attention; kept me interested; pleased me; made me smile; had a certain charm; made a
        good impression; had some nice touches; showed promise; kept me entertained; hit the right notes; {was} easy
        to like; {was} nicely done; {was} better than expected; {was} worth the time; did the trick; had my approval;
        went down well; came across nicely; had a nice glow; {was} up to standard; {was} on the right track; felt
        right; rang true; brightened my mood; passed the test; raised a few smiles
    """),
    -1: _split("""
        left me cold; fell flat; did little for me; failed to grab me; never quite worked; lost my interest; felt half
        finished; missed the mark; ran out of steam; wore thin; needed more care; lacked energy; {was} nothing
        special; {was} hard to care about; {was} a bit of a letdown; lost some shine; felt secondhand; tried my
        patience; sagged a bit; could have been better; had little to offer; made me yawn; {was} below par; {was} not
        my thing; came up short; seemed a bit lost; had no real bite; {was} off the mark
    """),
    -2: _split("""
        drove me up the wall; made me cringe; bored me to tears; set my teeth on edge; made me furious; made my skin
        crawl; insulted my intelligence; made me want to scream; turned my stomach; ruined everything; {was} pure
        torture; {was} beyond saving; {was} an utter mess; {was} painful to sit through; {was} a total disaster;
        stank; made my blood boil; {was} simply hateful; {was} nothing less than garbage; crushed my soul; had
        everyone in agony; {was} a curse; {was} a sick joke; {was} close to unbearable; made me weep with rage; gave
        me nightmares; {was} total trash; {was} a plague; {was} sheer agony; offended me; disgusted everyone; wore me
        down; {was} a horror; made me shout with anger; had me in despair; earned a flat zero; {was} hell on earth;
        {was} flat-out disgusting
    """),
}

# Predicates of any aspect that judge the film as a whole, by grade; no mention of a scene follows.
VERDICTS = {
    2: _split("""
        deserved a standing ovation; deserved every award there is; could not have been better; made my whole week;
        {was} worth the price of the ticket alone; put most other films to shame; set a new standard for everyone;
        lifted the whole film to greatness; {was} as good as it gets; {was} the best I have seen in years; turned a
        simple film into a masterpiece; {was} a triumph by any measure; left the rest of the year far behind; made me
        want to see it again at once; {was} in a class of {its} own; belonged in the record books; healed my tired old
        heart; gave me faith in humanity; raised the bar for good; earned every last cheer; left no eye dry; made a
        fan out of me; deserved a parade through town; topped anything in recent memory
    """),
    1: _split("""
        got the job done without any fuss; made a decent evening a little better; {was} better than I had feared; gave
        me most of what I wanted; stayed on the right side of average; {was} worth a look on a quiet evening; had more
        good moments than bad ones; made up for a few small flaws; kept the film on a steady course; suited this kind
        of film well enough; did more things right than wrong; left a mild but friendly impression; came together
        rather well in the end; showed that some thought went in; earned a friendly nod from me; passed the time in
        good spirits; made for a fair evening; did {its} part without complaint; gave the film some extra color; left
        little to complain about; made the ticket feel fairly priced; lived up to the poster; held up quite nicely;
        brought a bit of sunshine
    """),
    -1: _split("""
        could have used another round of work; let the rest of the film down; never quite found {its} feet; did not
        live up to the trailer; had more bad moments than good ones; made the film feel rather long; stayed on the
        wrong side of average; {was} not quite up to the task; seemed to belong in another film; did the film no
        favors at all; kept me at a distance for too long; showed that time had run short; left me wishing for a bit
        more; slipped my mind on the way home; earned only a shrug from me; passed by without much effect; made for a
        long evening; did {its} part without much heart; gave the film little extra color; left a bit to be desired;
        made the ticket feel slightly overpriced; fell short of the poster; creaked a little too often; brought a few
        gray clouds
    """),
    -2: _split("""
        made me want to walk out; ruined the whole evening for me; sank the film without a trace; could not have been
        any worse; {was} the worst I have seen in years; {was} a crime against cinema; had me begging for the end;
        made me want my money back; wrecked what was left of the film; {was} an embarrassment to everyone involved;
        should have been thrown in the trash; {was} a disgrace by any measure; turned a simple film into a nightmare;
        hit a new low for the year; made me swear off films for a month; belonged in a garbage can; broke my tired old
        heart; robbed me of all hope; lowered the bar for good; earned every last boo; left no nerve intact; made an
        enemy out of me; deserved a night in jail; sank below anything in recent memory
    """),
}


@dataclass(frozen=True)
class Aspect:
    """One side of a film that a sentence can judge.

    `details` names the kind of tail that may follow; `adjectives` and `verdicts` are phrases for this aspect alone.
    """

    singular: tuple[str, ...]
    plural: tuple[str, ...]
    details: str
    adjectives: dict[int, tuple[str, ...]]
    verdicts: dict[int, tuple[str, ...]]


def _aspect(singular: str, plural: str, details: str, phrases: dict[int, str]) -> Aspect:
    """Reads the phrases of each grade: adjectives, a bar, verdicts."""
    adjectives, verdicts = {}, {}
    for grade, text in phrases.items():
        adjectives[grade], verdicts[grade] = map(_split, text.split("|"))
    return Aspect(_split(singular), _split(plural), details, adjectives, verdicts)


ASPECTS = {
    "acting": _aspect(
        "the acting; the lead performance; the central performance; the whole cast",
        "the performances; the supporting performances",
        "scene",
        {
            2: """riveting; magnetic; luminous; captivating | moved me to tears more than once; lit up the screen in
                every shot; made every line ring true; ranked among the finest of the decade; gave each role a
                beating heart""",
            1: """natural; believable; unforced; convincing | felt natural and easy to believe; brought some warmth to
                the story; made the roles easy to believe; hit the right tone more often than not; gave the smaller
                roles some color""",
            -1: """wooden; mannered; hesitant; colorless | rarely rose above soap opera level; lacked any real spark of
                life; stayed on one note too long; felt more rehearsed than lived; never made me forget the camera""",
            -2: """amateurish; hammy; robotic; inept | would have shamed a school play; killed every emotion on the
                spot; made every line sound like a joke; ranked among the worst of the decade; made a block of wood
                look lively""",
        },
    ),
    "music": _aspect(
        "the music; the score; the soundtrack",
        "the songs",
        "scene",
        {
            2: """soaring; haunting; spine-tingling; angelic | gave me chills from the first note; soared like nothing
                I have heard before; sent me straight out to buy the record; turned every scene into pure magic;
                sounded like a gift from heaven""",
            1: """tuneful; catchy; hummable; graceful | set the mood without getting in the way; had a tune or two
                worth humming; fitted the story well enough; gave the film a gentle lift; {was} easy on the ears""",
            -1: """repetitive; syrupy; intrusive; plodding | sounded like music for an elevator; told me what to feel
                too often; used the same few notes too often; drifted by without leaving a mark; covered up some of
                the talk""",
            -2: """grating; deafening; noisy; shrill | made me want to cover my ears; drowned every scene in ugly
                noise; sounded like cats fighting in an alley; gave me a splitting headache within minutes; sounded
                like a truck full of broken glass""",
        },
    ),
    "camera": _aspect(
        "the camera work; the cinematography; the photography",
        "the images; the visuals",
        "scene",
        {
            2: """luminous; ravishing; gorgeous; hypnotic | made every frame look like a painting; found beauty in
                every single shot; gave me pictures I will always treasure; filled my eyes with wonder; made the
                whole world look new""",
            1: """clean; handsome; unfussy; attractive | gave the film a pleasing look; found a few lovely angles;
                made the action easy to follow; showed a steady and patient hand; caught the mood of the place""",
            -1: """drab; murky; shaky; grainy | made every room look the same; stayed too close for no clear reason;
                had the flat look of television; wandered about without much purpose; left the best views out of
                sight""",
            -2: """blurry; hideous; sickening; ugly | made me feel sick to my stomach; left me squinting at an ugly
                blur; turned every shot into an eyesore; hurt my eyes for two solid hours; looked like the work of a
                drunk""",
        },
    ),
    "dialogue": _aspect(
        "the dialogue; the script; the writing",
        "the conversations",
        "scene",
        {
            2: """sparkling; razor-sharp; profound; priceless | crackled with wit and wisdom; gave me lines I will
                quote forever; rang with truth in every word; made me want to write everything down; put many great
                plays in the shade""",
            1: """snappy; crisp; breezy; lively | had a few good lines; sounded like real people talking; raised a
                smile here and there; moved things along with some wit; said a thing or two worth hearing""",
            -1: """stilted; wordy; corny; talky | explained things we could already see; sounded more written than
                spoken; leaned on cliches too often; went around in circles for a while; had the ring of a greeting
                card""",
            -2: """idiotic; stupid; moronic; brainless | insulted every viewer in the room; made me groan out loud in
                my seat; {was} too stupid for words; sounded like the work of a broken machine; killed all hope with
                every sentence""",
        },
    ),
    "plot": _aspect(
        "the plot; the story; the storyline",
        "",
        "story",
        {
            2: """gripping; ingenious; captivating; thrilling | kept me on the edge of my seat; surprised me at every
                brilliant turn; fitted together like a perfect puzzle; swept me along from the first minute; went
                straight to my heart""",
            1: """clever; tidy; absorbing; neat | made me curious about what came next; made sense and moved along
                nicely; had a couple of neat surprises; gave me enough reasons to care; took a turn or two I liked""",
            -1: """thin; far-fetched; familiar; meandering | offered nothing I had not seen before; lost {its} way
                around the middle; left too many loose ends; relied on one coincidence too many; took a while to go
                nowhere much""",
            -2: """senseless; stupid; incoherent; idiotic | made no sense from beginning to end; insulted anyone with
                half a brain; fell apart within minutes; collapsed into a heap of nonsense; had more holes than a
                fishing net""",
        },
    ),
    "ending": _aspect(
        "the ending; the final act; the finale; the last scene",
        "the closing scenes; the last ten minutes",
        "ending",
        {
            2: """heavenly; triumphant; rapturous; thrilling | brought the whole theater to its feet; left me weeping
                with happiness; crowned the film with perfection; will stay in my heart forever; lifted everyone out
                of their seats""",
            1: """fitting; touching; bittersweet; hopeful | tied things up quite neatly; left me with a quiet smile;
                gave the story a fair goodbye; came as a small but pleasant surprise; answered most of my questions""",
            -1: """rushed; abrupt; hurried; vague | explained too little too late; felt tacked on at the last
                minute; left me shrugging on the way out; could be guessed an hour ahead; left a few too many
                questions""",
            -2: """insulting; idiotic; stupid; cruel | betrayed everything that came before; made me demand a refund;
                had people booing at the screen; left me furious about the wasted hours; spat in the face of the
                audience""",
        },
    ),
    "pacing": _aspect(
        "the pacing; the rhythm; the tempo",
        "",
        "story",
        {
            2: """thrilling; hypnotic; breathless; ideal | made two hours fly by like minutes; never let go of me for
                a second; made me forget the time completely; had me breathless from start to finish; swept everyone
                along like a great wave""",
            1: """brisk; unhurried; lively; sensible | got the film moving along nicely; gave the story room to
                breathe; picked up well after a slow start; left few dull stretches along the way; let the quiet
                moments settle""",
            -1: """sluggish; jerky; slack; choppy | dragged a little in the middle; had me checking my watch; slowed
                down at the wrong moments; took too long to get going; made the second hour feel long""",
            -2: """exhausting; deadly; crippling; agonizing | made every minute feel like an hour; put half of the
                audience to sleep; killed any trace of life; turned two hours into an endless ordeal; felt like a
                week in a waiting room""",
        },
    ),
    "humor": _aspect(
        "the humor; the comedy",
        "the jokes; the gags",
        "scene",
        {
            2: """hilarious; uproarious; side-splitting; priceless | had me laughing until I cried; brought the house
                down every time; made my sides hurt with laughter; had the whole room roaring; made me laugh harder
                than ever before""",
            1: """playful; amusing; lighthearted; cheerful | got a fair number of laughs; made me chuckle now and
                then; lightened the mood a little; raised more smiles than I expected; landed more often than not""",
            -1: """feeble; forced; labored; corny | got barely a smile out of me; missed more often than not; tried a
                bit too hard to please; seemed better suited to a sitcom; sounded like leftovers from another show""",
            -2: """tasteless; mean; vile; unfunny | made me cringe with shame; offended everyone within earshot; died a
                painful death every time; made the whole room groan; sank lower than I thought possible""",
        },
    ),
    "design": _aspect(
        "the set design; the production design",
        "the costumes; the sets",
        "scene",
        {
            2: """sumptuous; opulent; jaw-dropping; ravishing | carried me into another world; belonged in the finest
                museum; overflowed with beauty and invention; made me gasp at every new room; looked like a dream
                come true""",
            1: """eye-catching; handsome; colorful; inventive | gave the film a sense of place; showed a nice eye for
                detail; looked right for the period; added some welcome color; made good use of a small budget""",
            -1: """drab; fussy; cheap; anonymous | looked a bit cheap up close; seemed borrowed from another film;
                never quite matched the period; looked fresh from the rental shop; gave me little to look at""",
            -2: """hideous; ugly; garish; repulsive | looked like garbage from a dumpster; {was} an insult to the eyes;
                would have shamed a high school; made every actor look ridiculous; looked like an explosion in a
                thrift store""",
        },
    ),
    "effects": _aspect(
        "",
        "the visual effects; the special effects; the stunts",
        "scene",
        {
            2: """awe-inspiring; spectacular; jaw-dropping; thrilling | made my jaw drop to the floor; went beyond
                anything I had imagined; filled me with childlike wonder; looked more real than life itself; made me
                cheer like a kid""",
            1: """convincing; slick; nifty; clever | did enough without showing off; looked convincing for the most
                part; added a bit of excitement; blended in with the rest quite well; looked better than the budget
                suggested""",
            -1: """dated; fake; unconvincing; cheap | looked ten years out of date; took me out of the story; came
                across as a bit cheap; called for a bigger budget; never looked quite finished""",
            -2: """shoddy; ugly; hideous; inept | looked like a broken video game; made the whole audience jeer; looked
                too ugly for words; would have been a scandal decades ago; made a puppet show look expensive""",
        },
    ),
    "editing": _aspect(
        "the editing; the cutting",
        "",
        "scene",
        {
            2: """razor-sharp; seamless; virtuosic; hypnotic | made me forget to breathe; turned simple moments into
                pure electricity; made every cut a small miracle; should be taught in every film school; gave each
                scene the force of a storm""",
            1: """snappy; neat; unobtrusive; careful | made the scenes short and clear; linked the two stories rather
                well; left out most of the dead weight; helped the quieter moments along; gave the story a clear
                shape""",
            -1: """choppy; loose; careless; jumpy | left some scenes hanging in midair; could have lost twenty minutes;
                made the timeline hard to follow; cut away a moment too soon; left in too much dead weight""",
            -2: """chaotic; inept; butchered; brutal | hacked the story into worthless scraps; gave me motion sickness;
                made it all impossible to follow; should be shown to students as a warning; looked like the work of
                a blunt ax""",
        },
    ),
    "characters": _aspect(
        "",
        "the characters; the main characters",
        "story",
        {
            2: """lovable; lifelike; captivating; adorable | felt like friends I have always known; won me over within
                minutes; will live in my memory forever; leapt off the screen with life; made me laugh and cry with
                them""",
            1: """relatable; believable; lively; down-to-earth | gave me somebody to root for; had enough depth to
                hold me; grew on me after a while; behaved like people I might know; became more interesting as they
                went""",
            -1: """underwritten; shallow; cardboard; sketchy | never became more than sketches; gave me little reason
                to care; seemed to change without reason; blended into one another; stayed strangers to me until
                late""",
            -2: """loathsome; vile; hateful; stupid | got on my last nerve within minutes; made me wish them a painful
                end; had less life than a cardboard box; made me ashamed to be human; behaved like complete idiots""",
        },
    ),
    "direction": _aspect(
        "the direction; the staging; the filmmaking",
        "",
        "scene",
        {
            2: """visionary; inspired; virtuosic; fearless | showed a master at work; turned a small story into high
                art; brought out the very best in everyone; made me believe in cinema again; proved that genius is
                still among us""",
            1: """confident; careful; unshowy; clear | showed a firm and friendly hand; made good use of the
                locations; trusted the audience a fair bit; had the many threads in order; avoided most of the usual
                traps""",
            -1: """timid; heavy-handed; aimless; anonymous | played everything a bit too safe; underlined every point
                twice; never settled on one tone; lacked the nerve to go further; fell into most of the usual traps""",
            -2: """clueless; inept; brainless; arrogant | wrecked a perfectly good idea; showed no talent of any kind;
                turned a fine cast into zombies; brought out the very worst in everyone; proved that anyone can get
                hired""",
        },
    ),
}

# Frames around an adjective phrase {a}. The second set already speaks as somebody, so no "in my view" is added to it.
SUBJECT_FRAMES = _split("""
    {s} {was} {a}; {s} {was} {a}; {s} {was} {a} and {b}; {s} seemed {a}; {s} turned out to be {a}; {s} proved {a} and
    {b}
""")
SPEAKER_FRAMES = _split("""
    I found {s} {a}; I thought {s} {was} {a}; we all found {s} {a}; my {person} and I found {s} {a}; everyone in our
    row found {s} {a}; I considered {s} {a}; I would call {s} {a}; my {person} called {s} {a}; {s} struck me as {a};
    {s} seemed {a} to me
""")

# What may follow a judgement, whatever its grade. Every slot is one word, so that a pattern has one length.
TAILS = {
    "scene": _split("""
        throughout; during the {event}; in the {place} scenes; during the {which} {event}; when the {people} {did}; in
        the {kind} {place} scenes; , especially during the {event}; , especially in the {place} scenes; when the
        {people} {moved} the {spot}; in the scene where the {people} {did}; from the {event} to the {event2}; , above
        all in the {place} scenes; , particularly during the {which} {event}; in the scenes at the {spot}; ,
        especially when the {people} {did}; , above all when the {people} {moved} the {spot}
    """),
    "story": _split("""
        throughout; after the {event}; after the {which} {event}; in the first half; in the second half; once the
        {people} {did}; once the {people} {moved} the {spot}; from the {event} to the {event2}; , especially after the
        {event}; , especially after the {which} {event}; , especially once the {people} {did}; , above all once the
        {people} {moved} the {spot}; between the {event} and the {event2}
    """),
    "ending": _split("""
        , with the {people} at the {spot}; , with the {people} back home; after the {event}; after the {which}
        {event}; , with the {people} alone at the {spot}; , with the {people} and the {people2} reunited; , with that
        {which} {event}; , with the {event} and all; , with the {event} at the {spot}
    """),
    "company": _split("""
        , and my {person} agreed; , and my {person} said the same; , as I told my {person} afterwards; , as I told my
        {person} on the {ride}; , as my {person} also noticed; , and my {person} thought so as well; , and we
        discussed it on the {ride}; , or so I told my {person}; , as we said on the {ride}
    """),
    "opinion": _split("""
        in my view; , to my mind; , to be honest; , if you ask me; , in my humble opinion; , frankly; , I thought; , I
        must say; , I would argue; , I have to admit; , in my book; , for what it is worth; , as far as I am
        concerned; , all things considered; overall
    """),
}
OPENERS = _split("""
    For me,; Honestly,; To be honest,; In my view,; I must say,; Frankly,; To my mind,; All in all,
""")

# How a second sentence follows the first one, by the signs of both.
AGREEING = _split("Likewise,; And; Similarly,; Besides,; Also,; Plus,; Moreover,; Furthermore,; What is more,")
STRONGER = {
    1: _split("Better still,; Even better,; Best of all,"),
    -1: _split("Worse still,; Even worse,; Worst of all,"),
}
CONTRASTING = {
    1: _split("""
        Happily,; Thankfully,; Fortunately,; But; However,; On the plus side,; Still,; That said,; Then again,
    """),
    -1: _split("""
        Sadly,; Unfortunately,; Alas,; But; However,; On the other hand,; Still,; That said,; Then again,
    """),
}

TITLE_FIRST = _split("""
    Glass; Winter; Paper; Silver; Silent; Northern; Hidden; Crimson; Midnight; Copper; Distant; Amber; Velvet; Iron;
    Quiet; Second; Borrowed; Hollow; Painted; Western; Summer; Frozen; Scarlet; Salt; Violet; Burning; Broken; Lunar
""")
TITLE_LAST = _split("""
    Orchard; Harbor; Lantern; Station; Garden; Letter; Compass; River; Mirror; Island; Window; Bridge; Horizon; Map;
    Signal; Valley; Carousel; Meridian; Road; Tide; Cathedral; Kingdom; Sparrow; Engine; Notebook; Canyon; Fountain
""")
SLOTS = {
    "person": _split("""
        sister; brother; mother; father; wife; husband; cousin; aunt; uncle; neighbor; roommate; grandmother;
        daughter; son; boss; teacher; nephew; niece; coworker; grandfather; girlfriend; boyfriend; classmate;
        stepfather
    """),
    "event": _split("""
        wedding; storm; trial; funeral; chase; heist; dance; interview; escape; dinner; siege; flood; race; concert;
        auction; picnic; rescue; robbery; election; voyage; duel; banquet; rehearsal; ambush; blackout; parade;
        reunion; fire; kidnapping; blizzard; proposal; eclipse; sermon; carnival; shipwreck; audition; earthquake;
        inspection; lecture; snowstorm; hunt; party; harvest; coronation; riot; seance; exam; strike; jailbreak; raid;
        rally; feast
    """),
    "which": _split("long; final; first; second; big; midnight; short; early; late; climactic; opening; wild"),
    "kind": _split("""
        long; short; early; later; opening; closing; crowded; quiet; nighttime; winter; summer; silent
    """),
    "place": _split("""
        courtroom; hospital; kitchen; battle; crowd; street; classroom; prison; desert; harbor; market; barn; forest;
        office; subway; beach; hotel; diner; mountain; airport; castle; garden; library; rooftop; circus; boat;
        temple; factory; basement; stadium; village; church; island; snow; underwater; jungle; laboratory; elevator;
        tavern; hallway; bedroom; palace; tunnel; attic; cockpit; bunker; ranch; swamp; ballroom; museum; school;
        train; casino; bathroom; theater; camp; cave; dungeon; pool; bank
    """),
    "people": _split("""
        sisters; brothers; soldiers; sailors; twins; dancers; strangers; neighbors; thieves; nurses; miners; students;
        spies; lovers; cousins; detectives; farmers; pilots; monks; gangsters; lawyers; orphans; robots; widows;
        reporters; hunters; actors; waiters; cowboys; witches; pirates; teachers; tourists; villagers; guards; rebels;
        doctors; scientists; singers; children; parents; knights; refugees; hikers; smugglers; chefs; ghosts;
        generals; rivals; divers
    """),
    "spot": _split("""
        harbor; station; lake; farm; border; pier; lighthouse; airport; cabin; beach; chapel; bridge; hotel; river;
        castle; mill; museum; bakery; monastery; racetrack; cemetery; summit; canyon; ballroom; greenhouse; market;
        fortress; island; village; palace; theater; bank; warehouse; vineyard; barn; garage; temple; dam; mine;
        observatory; tower; school; ranch; factory; embassy; campsite; cave; cottage; park; shipyard
    """),
    "ride": _split("bus; train; drive; subway; walk; ferry; tram"),
    "genre": _split("""
        thriller; comedy; western; drama; ghost story; musical; heist film; road movie; war film; family film; crime
        drama; space adventure; mystery; romance; courtroom drama; period piece; detective story; horror film; spy
        film; sports film; fantasy; coming-of-age story; disaster film; pirate film; fairy tale; monster movie
    """),
    "topic": _split("""
        two brothers; a lighthouse keeper; a retired spy; a traveling circus; a missing painting; a village teacher; a
        night nurse; three bank clerks; a stubborn pilot; a family of bakers; an old violin; a chess player; a sunken
        ship; a shy magician; a border guard; twin sisters; a taxi driver; a lost dog; a forged will; a mountain
        village; an aging boxer; a runaway prince; two rival cooks; a radio host; a stolen letter; a young widow; a
        jazz band; a desert town; a time machine; a country doctor
    """),
    "city": _split("""
        Lisbon; Chicago; Tokyo; Dublin; Cairo; Montreal; Vienna; Naples; Boston; Havana; Oslo; Seoul; Texas; Alaska;
        Scotland; Brazil; Kenya; Iceland; Prague; Mumbai; Berlin; Sydney; Detroit; Norway; Athens; Peru
    """),
    "when": _split("""
        last night; on Sunday; last week; on Friday evening; over the holidays; yesterday afternoon; this morning; on
        my birthday; last month; on Saturday; on a rainy Tuesday; after work; two days ago; over the weekend
    """),
    "where": _split("""
        at home; at the old cinema downtown; on the plane; at a small festival; at the mall; in a packed theater; at a
        late screening; on my laptop; at the drive-in; at a matinee; in a nearly empty theater; on cable
    """),
    "did": _split("""
        met; quarreled; danced; escaped; waited; sang; prayed; surrendered; argued; hid; laughed; confessed; returned;
        voted; wept; slept; talked; whispered; fought; kissed; vanished; apologized; arrived; reunited; marched;
        drank; panicked; swam; collided; parted; rehearsed
    """),
    "moved": _split("""
        reached; left; found; crossed; searched; entered; watched; defended; robbed; visited; passed; rebuilt; burned;
        fled; guarded; approached; surrounded; explored; bought; painted
    """),
}
SLOTS["event2"], SLOTS["people2"] = SLOTS["event"], SLOTS["people"]
PROMPTS = _split("""
    I want to talk about {title}, a {genre} about {topic}.;
    You asked me about {title}, the {genre} set in {city}.;
    So, {title}: a {genre} about {topic}, which I saw {where}.;
    {When} I got around to {title}, a {genre} set in {city}.;
    {When} I saw {title}, a {genre} about {topic}, with my {person}.;
    My {person} and I watched {title}, a {genre} set in {city}, {when}.;
    {title} is a {genre} about {topic}, and I saw it {where}.;
    I caught {title}, the new {genre} about {topic}, {where} {when}.;
    My {person} picked {title} for movie night, a {genre} set in {city}.;
    Here are my thoughts on {title}, a {genre} about {topic}:;
    A few words about {title}, the {genre} I saw with my {person} {when}:;
    {When} my {person} took me to {title}, a {genre} about {topic}.;
    My {person} asked me about {title}, the {genre} I watched {where}.;
    We saw {title} {where}, a {genre} about {topic} in {city}.;
    I finally watched {title} {when}, a {genre} set in {city}.;
    {When} we went to see {title}, the {genre} that my {person} suggested.;
    Review of {title}, a {genre} about {topic}, seen {where} with my {person}:
""")
