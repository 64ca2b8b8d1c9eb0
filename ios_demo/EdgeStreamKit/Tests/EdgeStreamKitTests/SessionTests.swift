import EdgeStreamKit
import Foundation
import Testing

@Suite(.enabled(if: !Demo.isMissing, "the demo model is not installed: make build"))
struct SessionTests {
    @Test func streamsPastTheCache() async throws {
        let session = try await Session.open(Demo.shared.model, options: small(128, system: "Be brief."))
        let (text, tokens) = try await collect(session.answer(to: "Tell me about the sea.", options: seeded(400)))
        let stats = try await session.stats()
        #expect(tokens.count == 400 && tokens.allSatisfy { $0.id != nil && $0.cached <= 128 })
        #expect(tokens.last?.finish == .length && tokens.dropLast().allSatisfy { $0.finish == nil })
        #expect(zip(tokens, tokens.dropFirst()).allSatisfy { $1.seen == $0.seen + 1 })
        #expect(stats.seen > 400 && stats.evicted >= stats.seen - 128 && stats.cached <= 128 && stats.sinks > 4)
        let transcript = await session.transcript()
        #expect(transcript == [
            Message(role: .user, text: "Tell me about the sea."), Message(role: .assistant, text: text),
        ])
    }

    @Test func whatHasLeftTheWindowComesBack() async throws {
        let folder = try Folder()
        let session = try await Session.open(Demo.shared.model, options: small())
        try await session.useLog(at: folder.file("log"))
        _ = try await session.say("My friend Anna owns a blue kite.", 8)
        for hour in 0..<20 {
            _ = try await session.say("The hour of the day is \(hour).", 8)
        }
        #expect(try await session.recalled() == nil)
        _ = try await session.say("What does my friend Anna own?", 8)
        let recalled = try #require(await session.recalled())
        #expect(recalled.text == "My friend Anna owns a blue kite." && recalled.isFromUser && recalled.message == 0)
        try await session.forget(message: 0)
        await #expect(throws: EdgeStreamError.self) { try await session.forget(message: 0) }
        _ = try await session.say("What does my friend Anna own?", 8)
        #expect(try await session.recalled()?.text != recalled.text)
        await #expect(throws: EdgeStreamError.self) { try await session.useLog(at: URL(fileURLWithPath: "/nowhere/log")) }
    }

    @Test func theAnswerEndsWhereTheModelEndsIt() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        var options = AnswerOptions(sampling: Sampling(temperature: 0))
        options.maxTokens = 200
        let (_, tokens) = try await collect(session.answer(to: "Say only the word yes.", options: options))
        #expect(tokens.last?.finish == .end && tokens.last?.text == "" && tokens.count < 200)
    }

    //
    // cancelling
    //

    /// What the session has seen when an answer of so many tokens has been closed.
    private func seen(after n: Int) async throws -> Int64 {
        let session = try await Session.open(Demo.shared.model, options: small())
        _ = try await session.say("Count.", n)
        return try await session.stats().seen
    }

    @Test func aCancelledReaderGetsNoFurtherToken() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        let reader = Task {
            var n = 0
            for try await _ in session.answer(to: "Count.", options: seeded(nil)) {
                n += 1
                if n == 5 {
                    withUnsafeCurrentTask { $0?.cancel() }
                }
            }
            return n
        }
        #expect(try await reader.value == 5)
        try await session.settle()
        #expect(try await session.stats().seen == seen(after: 5))  // not one token more was computed
        #expect(await session.transcript().count == 2)
    }

    @Test func cancellingFromOutsideSettlesWithinOneToken() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        let (progress, report) = AsyncStream.makeStream(of: Int.self)
        let reader = Task {
            var n = 0
            for try await _ in session.answer(to: "Count.", options: seeded(nil)) {
                n += 1
                report.yield(n)
            }
            return n
        }
        for await n in progress where n == 3 {
            reader.cancel()
            break
        }
        let n = try await reader.value
        try await session.settle()
        let after = try await session.stats().seen
        let exact = try await seen(after: n)
        #expect(after == exact || after == exact + 1)  // the token that was being computed
        #expect(try await session.say("And now?", 5).isEmpty == false)
    }

    @Test func leavingTheLoopClosesTheAnswer() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        for try await token in session.answer(to: "Count.", options: seeded(nil)) where token.seen > 0 {
            break
        }
        try await session.settle()
        #expect(try await session.stats().seen == seen(after: 1))
        #expect(await session.transcript().count == 2)
    }

    @Test func cancellingWhileReadingLeavesTheConversationAsItWas() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        _ = try await session.say("Hello", 5)
        let (before, transcript) = (try await session.stats().seen, await session.transcript())
        let long = String(repeating: "The sea is wide. ", count: 2000)
        let reader = Task {
            try await collect(session.answer(to: long, options: seeded(5)) { _, _ in
                withUnsafeCurrentTask { $0?.cancel() }
            }).tokens
        }
        #expect(try await reader.value.isEmpty)
        #expect(try await session.stats().seen == before)
        #expect(await session.transcript() == transcript)
    }

    @Test func stopEndsTheStreamWithARecordThatSaysSo() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        var tokens: [Token] = []
        for try await token in session.answer(to: "Count.", options: seeded(nil)) {
            tokens.append(token)
            if tokens.count == 4 {
                session.stop()
            }
        }
        #expect(tokens.count == 5 && tokens.last?.finish == .stopped && tokens.last?.id == nil)
        #expect(try await session.stats().seen == seen(after: 4))
    }

    @Test func anAnswerThatRepeatsItselfEnds() async throws {
        let model = try await Demo.shared.model
        let token = try #require(try model.tokenize(" sea").first)
        let session = try await Session.open(model, options: small(1024))
        var options = seeded(450)
        options.sampling.logitBias[token] = 1000
        let (text, tokens) = try await collect(session.answer(to: "Chant.", options: options))
        #expect(tokens.last?.finish == .repetition && tokens.count == 388 && text.hasPrefix(" sea sea"))
        #expect(await session.transcript().last?.text == " sea")  // one period stays
        options.endsLoops = false
        let (_, all) = try await collect(session.regenerate(options: options))
        #expect(all.last?.finish == .length && all.count == 450)
    }

    @Test func aNewMessageSupersedesAnOpenAnswer() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        var first = session.answer(to: "Count.", options: seeded(nil)).makeAsyncIterator()
        _ = try await first.next()
        _ = try await session.say("Stop that.", 3)
        #expect(await error { _ = try await first.next() } == .superseded)
        #expect(await session.transcript().map(\.role) == [.user, .assistant, .user, .assistant])
        #expect(try await session.stats().cached > 0)
    }

    //
    // several, saved, restored
    //

    @Test func twoSessionsAtOnceSayWhatEachSaysAlone() async throws {
        let model = try await Demo.shared.model
        @Sendable func run(_ text: String, _ seed: UInt32) async throws -> String {
            let session = try await Session.open(model, options: small(128))
            return try await session.say(text, 150, seed: seed)
        }
        let alone = try await (run("A poem.", 1), run("A story.", 2))
        async let left = run("A poem.", 1)
        async let right = run("A story.", 2)
        let together = try await (left, right)
        #expect(together == alone && alone.0 != alone.1)
    }

    @Test func savedAndRestoredItGoesOnIdentically() async throws {
        let folder = try Folder()
        let model = try await Demo.shared.model
        let options = small(128, system: "You are a pirate.")
        let session = try await Session.open(model, options: options)
        _ = try await session.say("Tell me a story.", 200)  // beyond the cache
        try await session.save(to: folder.file("s"))
        let saved = try await Session.peek(folder.file("s"))
        #expect(saved.belongs(to: model.info) && saved.messageCount == 2 && saved.contextSize == 128)
        let expected = (try await session.say("Go on.", 100), await session.transcript())
        await session.close()

        let restored = try await Session.restore(model, from: folder.file("s"), options: small(512))
        #expect(try await restored.stats().contextSize == 128)
        let got = (try await restored.say("Go on.", 100), await restored.transcript())
        #expect(got == expected)
    }

    @Test func savingEndsAnOpenAnswer() async throws {
        let folder = try Folder()
        let session = try await Session.open(Demo.shared.model, options: small())
        var stream = session.answer(to: "Count.", options: seeded(nil)).makeAsyncIterator()
        _ = try await stream.next()
        try await session.save(to: folder.file("s"))
        #expect(try await Session.peek(folder.file("s")).messageCount == 2)
        #expect(await error { _ = try await stream.next() } == .superseded)
    }

    @Test func regenerating() async throws {
        let session = try await Session.open(Demo.shared.model, options: small())
        let first = try await session.say("A word, please.", 20, seed: 1)
        let seen = try await session.stats().seen
        let second = try await collect(session.regenerate(options: seeded(20, seed: 2))).text
        #expect(first != second)
        #expect(try await session.stats().seen == seen)
        #expect(await session.transcript().map(\.text) == ["A word, please.", second])
        try await session.clear()
        #expect(await session.transcript().isEmpty)
        #expect(await error { _ = try await collect(session.regenerate()) } == .invalid)
    }

    @Test func aPlainStream() async throws {
        let session = try await Session.open(Demo.shared.model, options: small(128, isChat: false))
        try await session.read(String(repeating: "The sea is wide. ", count: 60))
        #expect(try await session.stats().seen > 128)
        let (text, tokens) = try await collect(session.write(options: seeded(20)))
        #expect(tokens.count == 20 && !text.isEmpty)
        #expect(await error { _ = try await session.say("Hello", 1) } == .invalid)
    }

    //
    // text
    //

    @Test func realTokensSplitCharacters() async throws {
        let model = try await Demo.shared.model
        let text = "smile 😀, 漢字かな交じり文, 👩‍👩‍👧‍👦, 🇪🇸, 한국어"
        let pieces = try model.tokenize(text).map { try model.bytes(of: $0) }
        #expect(pieces.contains { String(validating: $0, as: UTF8.self) == nil })  // some end inside a character
        var assembler = UTF8Assembler()
        let assembled = pieces.map { assembler.append($0) }
        #expect(assembled.joined() == text)
        #expect(!assembled.joined().unicodeScalars.contains("\u{FFFD}"))
    }

    /// The model is made to write with the tokens of these characters, some of which stay incomplete: what the stream
    /// yields is what the transcript keeps, replacement characters included.
    @Test(arguments: ["😀", "漢"])
    func writtenCharactersComeTogether(character: String) async throws {
        let model = try await Demo.shared.model
        let parts = try model.tokenize(character)
        #expect(parts.count > 1)
        let session = try await Session.open(model, options: small())
        var options = seeded(150)
        options.sampling.temperature = 2
        for part in parts {
            options.sampling.logitBias[part] = 60
        }
        options.sampling.topP = 1
        options.sampling.minP = 0
        let (text, tokens) = try await collect(session.answer(to: "Draw.", options: options))
        // the parts, in whatever order the model likes, make characters of the same length
        #expect(text.unicodeScalars.contains { $0.value > 0x7F && $0 != "\u{FFFD}" })
        #expect(tokens.contains { $0.text.isEmpty && $0.finish == nil })  // a part of a character
        #expect(await session.transcript().last?.text == text)
    }

    @Test func zeroBytes() async throws {
        let model = try await Demo.shared.model
        let zero = try #require(
            try (0..<Int32(model.info.vocabularySize)).first { try model.bytes(of: $0) == [0] })
        let session = try await Session.open(model, options: small())
        var options = seeded(3)
        options.sampling.logitBias[zero] = 1000
        let (text, _) = try await collect(session.answer(to: "Nothing.", options: options))
        #expect(text == "\0\0\0")
        #expect(await session.transcript().last?.text == "\0\0\0")
        #expect(await error { _ = try await session.say("a\0b", 1) } == .invalid)  // rather than cut
    }

    //
    // thinking, tools, answers that go on
    //

    /// ChatML with thoughts, which only the answers after the last question keep.
    static let thinking =
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        + "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
        + "{{ '<think>\n' + m.reasoning_content|trim + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined "
        + "and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"

    @Test func anAnswerThatWasCutGoesOn() async throws {
        let model = try await Demo.shared.model
        let options = AnswerOptions(sampling: Sampling(temperature: 0), maxTokens: 30, ignoresEnd: true)
        var first = options
        first.maxTokens = 10
        var rest = options
        rest.maxTokens = 20
        let one = try await Session.open(model, options: small())
        let whole = try await collect(one.answer(to: "Tell me about the sea.", options: options)).text
        let two = try await Session.open(model, options: small())
        let begun = try await collect(two.answer(to: "Tell me about the sea.", options: first)).text
        #expect(begun + (try await collect(two.goOn(options: rest)).text) == whole)
        #expect(await two.transcript() == (await one.transcript()))
        let none = try await Session.open(model, options: small())
        #expect(await error { _ = try await collect(none.goOn()) } == .invalid)
    }

    @Test func thinkingIsTheTemplates() async throws {
        let model = try await Demo.shared.model
        var options = small()
        options.chatTemplate = Self.thinking
        options.thinks = false
        let without = try await Session.open(model, options: options)
        _ = try await without.say("One?", 3)
        options.thinks = nil
        let with = try await Session.open(model, options: options)
        let (_, tokens) = try await collect(with.answer(to: "One?", options: seeded(3)))
        #expect(try await without.stats().seen > (try await with.stats().seen))  // its thoughts are closed already
        #expect(tokens.allSatisfy { !$0.isThinking })
        let answer = try await collect(
            with.answer(toMessages: #"[{"role": "tool", "content": "42"}, {"role": "user", "content": "So?"}]"#, options: seeded(3)))
        #expect(answer.tokens.count == 3)
        let messages = await with.transcript()
        #expect(messages.map(\.role) == [.user, .assistant, .tool, .user, .assistant] && messages[2].text == "42")
        options.tools = "[{"
        #expect(await error { _ = try await Session.open(model, options: options) } == .invalid)
    }

    //
    // errors
    //

    @Test func errorsAreTyped() async throws {
        let folder = try Folder()
        let nowhere = folder.file("nothing")
        #expect(await error { _ = try await Model.load(nowhere) } == .io)
        let noModel = folder.file("no.gguf")
        try Data("GGUF, but no model".utf8).write(to: noModel)
        #expect(await error { _ = try await Model.load(noModel) } == .memory)
        let model = try await Demo.shared.model
        #expect(await error { _ = try await Session.restore(model, from: nowhere) } == .io)
        var options = small()
        options.sinks = -1
        #expect(await error { _ = try await Session.open(model, options: options) } == .invalid)
        options = small()
        options.chatTemplate = "pigeon"
        #expect(await error { _ = try await Session.open(model, options: options) } == .invalid)
        #expect(model.whyItCannotChat() == nil)
        #expect(model.whyItCannotChat(template: "pigeon")?.contains("pigeon") == true)
        #expect(model.whyItCannotChat(template: "chatml") == nil)
        #expect(model.whyItCannotChat(template: "{% for %}") != nil)

        let session = try await Session.open(model, options: small())
        _ = try await session.say("Hello", 5)
        try await session.save(to: folder.file("s"))
        var bytes = try Data(contentsOf: folder.file("s"))
        bytes[bytes.count / 2] ^= 1
        try bytes.write(to: folder.file("s"))
        #expect(await error { _ = try await Session.restore(model, from: folder.file("s"), options: small()) } == .format)
        try await session.save(to: folder.file("s"))
        options = small()
        options.keyType = .f32
        #expect(await error { _ = try await Session.restore(model, from: folder.file("s"), options: options) } == .otherModel)
        await session.close()
        #expect(await error { _ = try await session.say("Hello", 1) } == .closed)
        #expect(await error { try await session.save(to: folder.file("s")) } == .closed)
        session.stop()
    }

    @Test func loadingCanBeCancelled() async throws {
        let url = try await Demo.shared.model.url
        let task = Task { try await Model.load(url) { _, _ in withUnsafeCurrentTask { $0?.cancel() } } }
        task.cancel()
        #expect(await error { _ = try await task.value } == .stopped)
    }

    @Test func memoryIsKnownBeforeLoading() async throws {
        let model = try await Demo.shared.model
        let one = try await Model.memoryNeed(of: model.url, session: small(1024))
        var options = small(4096)
        options.keyType = .q8_0
        options.valueType = .q8_0
        let four = try await Model.memoryNeed(of: model.url, session: options)
        #expect(one.contextSize == 1024 && one.weights >= model.info.byteCount)
        #expect(one.cache == 1024 * 30 * 2 * 3 * 64 * 2)  // 30 layers, keys and values, 3 heads of 64, float16
        #expect(four.cache < one.cache * 4 && four.cache > one.cache * 2)
        #expect(one.total == one.weights + one.cache + one.sinks + one.compute)
    }

    @Test func checksums() async throws {
        let folder = try Folder()
        try Data("abc".utf8).write(to: folder.file("abc"))
        #expect(
            try await sha256(of: folder.file("abc"))
                == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        #expect(await error { _ = try await sha256(of: folder.file("nothing")) } == .io)
    }
}
