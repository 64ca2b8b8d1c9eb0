import CEdgeStream
import Foundation

/// A conversation, or a plain stream, of any length at constant memory.
///
///     let model = try await Model.load(url)
///     let session = try await Session.open(model)
///     for try await token in session.answer(to: "Hello") {
///         print(token.text, terminator: "")
///     }
///
/// Everything is computed on a thread of the session's own. An answer is written at the pace at which its stream is
/// read: nothing is computed ahead, and nothing piles up. It ends when the model ends it, or when the reading task is
/// cancelled, the stream is dropped, or the session is asked for something else; what was written until then stays, as
/// a closed turn.
public actor Session {
    private let thread = EngineThread()
    public nonisolated var unownedExecutor: UnownedSerialExecutor { thread.asUnownedSerialExecutor() }

    private nonisolated let handle = Handle()
    private let model: Model
    private let options: SessionOptions

    private init(model: Model, options: SessionOptions) {
        self.model = model
        self.options = options
    }

    //
    // life
    //

    public static func open(
        _ model: Model, options: SessionOptions = SessionOptions()
    ) async throws(EdgeStreamError) -> Session {
        let session = Session(model: model, options: options)
        try await session.open()
        return session
    }

    /// Goes on where a saved session ended, with the identical tokens. Cache size, sinks, system prompt and tools are the
    /// file's; cache types, threads, chat template and thinking are the options'. The file is not changed.
    public static func restore(
        _ model: Model, from url: URL, options: SessionOptions = SessionOptions()
    ) async throws(EdgeStreamError) -> Session {
        let session = Session(model: model, options: options)
        try await session.restore(from: url)
        return session
    }

    /// What a file holds. Needs no model.
    public static func peek(_ url: URL) async throws(EdgeStreamError) -> SavedSession {
        try await onThread("peek") { _ throws(EdgeStreamError) in
            var info = es_app_session_info()
            try EdgeStreamError.check(es_app_session_peek(url.path, &info))
            return SavedSession(info)
        }
    }

    private func open() throws(EdgeStreamError) {
        try adopt { params, out in es_app_session_open(model.handle, params, out) }
    }

    private func restore(from url: URL) throws(EdgeStreamError) {
        try adopt { params, out in es_app_session_restore(model.handle, params, url.path, out) }
    }

    private func adopt(
        _ make: (es_app_session_params, UnsafeMutablePointer<OpaquePointer?>) -> Int32
    ) throws(EdgeStreamError) {
        let (status, opened) = try options.withC { params in
            var opened: OpaquePointer?
            let status = make(params, &opened)
            return (status, opened)
        }
        try EdgeStreamError.check(status)
        handle.set(opened)
    }

    /// Frees cache and buffers now. Everything after it fails with `.closed`.
    public func close() {
        handle.set(nil)
    }

    /// Writes cache and transcript to a file: the old session or the new one, never a part. Settles first.
    public func save(to url: URL) throws(EdgeStreamError) {
        try settle()
        try EdgeStreamError.check(es_app_session_save(try pointer(), url.path))
    }

    private func pointer() throws(EdgeStreamError) -> OpaquePointer {
        guard let pointer = handle.pointer else { throw EdgeStreamError(.closed, "the session is closed") }
        return pointer
    }

    //
    // conversation
    //

    /// Says something; the stream yields the answer token by token. It is read when the first token is asked for. If that
    /// fails or is cancelled, the conversation is as it was before.
    public nonisolated func answer(
        to text: String, options: AnswerOptions = AnswerOptions(), onReading: ProgressHandler? = nil
    ) -> AsyncThrowingStream<Token, any Error> {
        say(text, options, onReading, es_app_say)
    }

    /// The same with messages as in OpenAI's requests, a JSON list: it answers tool calls.
    public nonisolated func answer(
        toMessages json: String, options: AnswerOptions = AnswerOptions(), onReading: ProgressHandler? = nil
    ) -> AsyncThrowingStream<Token, any Error> {
        say(json, options, onReading, es_app_say_messages)
    }

    private typealias Say =
        @Sendable (
            OpaquePointer?, UnsafePointer<CChar>?, es_app_answer_params, es_app_progress?, UnsafeMutableRawPointer?
        ) -> Int32

    private nonisolated func say(
        _ text: String, _ options: AnswerOptions, _ onReading: ProgressHandler?, _ say: @escaping Say
    ) -> AsyncThrowingStream<Token, any Error> {
        tokens { session throws(EdgeStreamError) in
            try refuseZeroBytes(text)
            let pointer = try session.pointer()
            let status = try options.withC { params in
                withProgress(onReading, isCancelled: { Task.isCancelled }) { callback, user in
                    say(pointer, text, params, callback, user)
                }
            }
            try EdgeStreamError.check(status)
        }
    }

    /// Takes the last answer back and gives another one.
    public nonisolated func regenerate(
        options: AnswerOptions = AnswerOptions()
    ) -> AsyncThrowingStream<Token, any Error> {
        tokens { session throws(EdgeStreamError) in
            let pointer = try session.pointer()
            try EdgeStreamError.check(try options.withC { es_app_regenerate(pointer, $0) })
        }
    }

    /// Goes on with the last answer, if it was cut: by `AnswerOptions.maxTokens`, `stop()`, or because it was not read on.
    public nonisolated func goOn(
        options: AnswerOptions = AnswerOptions()
    ) -> AsyncThrowingStream<Token, any Error> {
        tokens { session throws(EdgeStreamError) in
            let pointer = try session.pointer()
            try EdgeStreamError.check(try options.withC { es_app_continue(pointer, $0) })
        }
    }

    /// Ends an answer that is still open, if there is one: what was written until then stays.
    public func settle() throws(EdgeStreamError) {
        handle.current = nil
        try EdgeStreamError.check(es_app_end(try pointer()))
    }

    /// Stops what goes on now: reading (between decodes; on the CPU, within one) or writing (between tokens; the stream
    /// ends with a token whose finish is `.stopped`). Returns at once, from any thread.
    public nonisolated func stop() {
        handle.stop()
    }

    /// Oldest first, without the system prompt and without an answer that is still open. Its oldest messages are dropped
    /// beyond a million bytes.
    public func transcript() -> [Message] {
        guard let pointer = handle.pointer else { return [] }
        return (0..<es_app_message_count(pointer)).compactMap { index in
            var message = es_app_message()
            guard es_app_message_get(pointer, index, &message) == ES_OK.rawValue,
                let role = Message.Role(rawValue: String(cString: message.role))
            else { return nil }
            func text(_ start: UnsafePointer<CChar>?, _ count: Int) -> String {
                String(decoding: UnsafeRawBufferPointer(start: start, count: count), as: UTF8.self)
            }
            return Message(
                role: role, text: text(message.text, message.n_text), thinking: text(message.thinking, message.n_thinking),
                toolCalls: message.tool_calls.map { String(cString: $0) })
        }
    }

    /// Messages since the conversation began, dropped ones included: a message that was taken back does not count.
    public func messageCount() -> Int {
        handle.pointer.map { Int(es_app_message_count($0) + es_app_message_dropped($0)) } ?? 0
    }

    /// Messages that the transcript no longer has.
    public func droppedMessageCount() -> Int {
        handle.pointer.map { Int(es_app_message_dropped($0)) } ?? 0
    }

    /// Forgets everything but the system prompt.
    public func clear() throws(EdgeStreamError) {
        try settle()
        try EdgeStreamError.check(es_app_session_clear(try pointer()))
    }

    public func stats() throws(EdgeStreamError) -> StreamStats {
        var c = es_stream_stats()
        try EdgeStreamError.check(es_app_session_stats(try pointer(), &c))
        return StreamStats(c)
    }

    //
    // recall
    //

    /// Keeps what is said in a log, and reads a message with the line of it that belongs to it and has left the window.
    /// url: its file, made if it is not there, to be deleted with the session's; nil: in memory. maxBytes: beyond which
    /// the oldest is dropped; 0: 64 MiB. tokens: of a line that may come back; 0: nothing does. If it fails, the
    /// conversation goes on without.
    public func useLog(at url: URL?, maxBytes: UInt64 = 0, tokens: UInt32 = 64) throws(EdgeStreamError) {
        try settle()
        try EdgeStreamError.check(es_app_use_log(try pointer(), url?.path, maxBytes, tokens))
    }

    /// What the newest message was read with.
    public func recalled() throws(EdgeStreamError) -> Recalled? {
        var c = es_app_recalled()
        try EdgeStreamError.check(es_app_get_recalled(try pointer(), &c))
        return Recalled(c)
    }

    /// Deletes a message from the log; transcript and window keep it.
    public func forget(message: Int) throws(EdgeStreamError) {
        try EdgeStreamError.check(es_app_forget(try pointer(), Int64(message)))
    }

    //
    // plain streams
    //

    /// Reads any amount of text. If cancelled, what was read stays.
    public func read(
        _ text: String, special: Bool = false, onReading: ProgressHandler? = nil
    ) throws(EdgeStreamError) {
        try refuseZeroBytes(text)
        try settle()
        let pointer = try pointer()
        let status = withProgress(onReading, isCancelled: { Task.isCancelled }) { callback, user in
            es_app_feed(pointer, text, special, callback, user)
        }
        try EdgeStreamError.check(status)
    }

    /// Writes on after what was read. The same sampling options go on with the random sequence.
    public nonisolated func write(
        options: AnswerOptions = AnswerOptions()
    ) -> AsyncThrowingStream<Token, any Error> {
        tokens { session throws(EdgeStreamError) in
            let pointer = try session.pointer()
            try EdgeStreamError.check(try options.withC { es_app_begin(pointer, $0) })
        }
    }

    //
    // writing
    //

    private typealias Opening = @Sendable (isolated Session) throws(EdgeStreamError) -> Void

    private nonisolated func tokens(_ open: @escaping Opening) -> AsyncThrowingStream<Token, any Error> {
        let writing = Writing(self, open)
        return AsyncThrowingStream {
            try await withTaskCancellationHandler {
                try await writing.next()
            } onCancel: {
                writing.cancel()
            }
        }
    }

    /// One answer on its way to its reader. When the reader drops the stream, it is settled.
    private final class Writing: @unchecked Sendable {
        let id: Int
        private let session: Session
        // what follows is used on the session's thread only
        private var open: Opening?
        private var assembler = UTF8Assembler()
        var isDone = false

        init(_ session: Session, _ open: @escaping Opening) {
            id = session.handle.newID()
            self.session = session
            self.open = open
        }

        deinit {
            if session.handle.current == id {
                Task { [session, id] in await session.settle(id) }
            }
        }

        func next() async throws(EdgeStreamError) -> Token? {
            try await session.next(self)
        }

        func cancel() {
            session.handle.stop(id)
        }

        fileprivate func opening() -> Opening? {
            defer { open = nil }
            return open
        }

        fileprivate func token(_ c: es_app_token) -> Token {
            Token(c, assembler: &assembler)
        }
    }

    private func next(_ writing: Writing) throws(EdgeStreamError) -> Token? {
        if writing.isDone { return nil }
        if let open = writing.opening() {
            if Task.isCancelled { return nil }
            handle.current = writing.id
            do {
                try open(self)
            } catch {
                handle.current = nil
                if error.code == .stopped && Task.isCancelled { return nil }
                throw error
            }
        } else if handle.current != writing.id {
            throw EdgeStreamError(.superseded, "the session was asked for something else")
        }
        if Task.isCancelled {
            try settle()
            return nil
        }
        var c = es_app_token()
        let status = es_app_next(try pointer(), &c)
        if status != ES_OK.rawValue || c.finish != Int32(ES_APP_UNFINISHED.rawValue) {
            handle.current = nil
            writing.isDone = true
        }
        try EdgeStreamError.check(status)
        return writing.token(c)
    }

    private func settle(_ id: Int) {
        if handle.current == id {
            try? settle()  // an answer that nobody waits for: a failure shows at the next call
        }
    }
}

/// The C session, and which answer is being written. `stop` may be called from any thread while the session works.
private final class Handle: @unchecked Sendable {
    private let lock = NSLock()
    private var session: OpaquePointer?
    private var writing: Int?
    private var lastID = 0

    deinit {
        es_app_session_free(session)
    }

    var pointer: OpaquePointer? { lock.withLock { session } }

    func newID() -> Int {
        lock.withLock {
            lastID += 1
            return lastID
        }
    }

    var current: Int? {
        get { lock.withLock { writing } }
        set { lock.withLock { writing = newValue } }
    }

    func set(_ new: OpaquePointer?) {
        let old = lock.withLock {
            defer { session = new }
            writing = nil
            return session
        }
        es_app_session_free(old)
    }

    /// If `id` is given, only where that answer is the one that is open.
    func stop(_ id: Int? = nil) {
        lock.withLock {
            if id == nil || id == writing {
                es_app_stop(session)
            }
        }
    }
}
